"""One file a view of a `Report`: terminal, HTML, Markdown, JUnit XML, and the JSON's schema."""
