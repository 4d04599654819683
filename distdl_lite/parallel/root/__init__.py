"""One rank has the script, the weights and the loss; the others compute."""
