"""Pages in and out: fold exact tokens into pages, attend to pages, unfold them. One module per backend."""
