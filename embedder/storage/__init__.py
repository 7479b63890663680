"""What is kept: the store, the collections that follow it commit by commit, writes, watches."""
