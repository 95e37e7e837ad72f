"""Other projects' formats, in and out."""
