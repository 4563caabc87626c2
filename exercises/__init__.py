"""Ten functions of the lesson to write, and what grades them: see README.md."""
