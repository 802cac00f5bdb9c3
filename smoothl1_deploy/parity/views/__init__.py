"""The views of a `Report`: HTML, Markdown and JUnit XML, a module each; what they share."""
