"""The same numbers, sooner: each file is the twin of a definition in the lesson, under its name."""
