# Kernels of this image show what programs written for E2B look for: see cellblock_e2b.py.
c = get_config()  # noqa: F821
c.InteractiveShell.colors = "nocolor"
# Long sequences are shown whole.
c.PlainTextFormatter.max_seq_length = 0
c.InteractiveShellApp.extensions = ["cellblock_e2b"]
