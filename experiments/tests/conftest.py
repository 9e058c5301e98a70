"""The settings of the library's tests."""

from tests.conftest import standard_promotion, strict_promotion, x64  # noqa: F401
