"""Selection: limits and classes of contexts, tables first, else the live selector, and the queue of `select_async`."""
