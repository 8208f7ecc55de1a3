import pytest

from minigpt.cli.exits import orderly_exit
from minigpt.core.process import preserved_process


def test_error_that_follows_from_ctrl_c_is_one_line(capsys):
    """OmegaConf, for example, fails while it restores its flags after a KeyboardInterrupt."""

    def interrupted() -> None:
        try:
            raise KeyboardInterrupt
        finally:
            raise AttributeError("a flag")

    with preserved_process(), pytest.raises(SystemExit) as leaving, orderly_exit("evaluate"):
        interrupted()
    assert leaving.value.code == 130
    assert capsys.readouterr().err == "stopped by SIGINT\n"
    with preserved_process(), pytest.raises(AttributeError), orderly_exit("evaluate"):
        raise AttributeError("a bug")
