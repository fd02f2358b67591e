"""The results store, read and turned into one page, two data files, Markdown and LaTeX."""
