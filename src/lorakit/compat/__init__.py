"""Other libraries' names over lorakit's parts, so that a script of theirs runs after a change of its import line."""
