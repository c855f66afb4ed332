"""From a data file to tokens with a mask of what is trained."""
