"""What checks the classes of those who extend fxray: subclass, name yours, run pytest."""

from fxray.testing.selections import DTYPES, SelectionTests, tensors
from fxray.testing.stores import StoreTests

__all__ = ["DTYPES", "SelectionTests", "StoreTests", "tensors"]
