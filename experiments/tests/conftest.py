"""Settings for every test, shared with the tests of the library."""

from tests.conftest import standard_promotion, strict_promotion  # noqa: F401
