"""Timelines of what ranks do, and where their time went."""
