"""Other libraries' names for this one, so that programs written for them run. Nothing else imports these."""
