"""`lorakit demo`: `orders` makes a task out of `phrases`, `run` trains on it and compares. Reads no data file."""
