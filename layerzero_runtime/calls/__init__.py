"""The operations as functions on tensors. Importing this package imports torch."""
