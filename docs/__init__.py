"""The documentation: pages in Markdown, and the tools that fill in their tables."""
