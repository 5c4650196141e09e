"""What checks the classes of those who extend fxray: subclass, name yours, run pytest."""

import importlib.util

from fxray.errors import MissingExtraError

if importlib.util.find_spec("hypothesis") is None:
    msg = "fxray.testing draws its examples with hypothesis: pip install 'fxray[test]' brings it"
    raise MissingExtraError(msg)

from fxray.testing.selections import DTYPES, SelectionTests, tensors
from fxray.testing.stores import StoreTests

__all__ = ["DTYPES", "SelectionTests", "StoreTests", "tensors"]
