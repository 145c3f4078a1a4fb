"""common/optional.py: what is said about an optional package that cannot be imported."""

import sys

import pytest

from common.errors import UserError
from common.optional import import_optional


def test_an_installed_module_is_returned():
    assert import_optional("json.decoder", purpose="tests") is sys.modules["json.decoder"]


def test_a_package_that_is_not_installed_is_named():
    with pytest.raises(UserError, match="^drawing needs no_such_package: pip install no_such_pack"):
        import_optional("no_such_package.figure", purpose="drawing")


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        ("import no_such_dependency", "ModuleNotFoundError: No module named 'no_such_dependency'"),
        ("raise ValueError('backend\\nis wrong')", "ValueError: backend is wrong"),
        ("raise ImportError('undefined symbol')", "ImportError: undefined symbol"),
        ("raise OSError", "OSError: "),
    ],
)
def test_a_package_that_fails_is_not_called_missing(tmp_path, monkeypatch, code, reason):
    (tmp_path / "a_broken_package.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "a_broken_package", raising=False)
    with pytest.raises(UserError) as raised:
        import_optional("a_broken_package", purpose="figures")
    assert f"cannot be imported ({reason})" in str(raised.value)
    assert "pip install" not in str(raised.value)
