import pytest

from tests.helpers.hf_models import HF_MODELS, save_hf_model
from utils.text.builtin.stories import builtin_stories


@pytest.fixture(scope="session")
def hf_folders(tmp_path_factory):
    """The folder of each of HF_MODELS. Tests read them and leave them as they are."""
    folder = tmp_path_factory.mktemp("hf")
    return {name: save_hf_model(folder / name, config) for name, config in HF_MODELS.items()}


@pytest.fixture
def story_file(tmp_path):
    """A text file of some built-in stories."""
    path = tmp_path / "stories.txt"
    path.write_text("\n".join(builtin_stories(20)))
    return path
