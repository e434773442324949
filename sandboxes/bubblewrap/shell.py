class BubblewrapShell:
    pass
