"""Facades with other libraries' names: a script that changes only its import line runs on lorakit."""
