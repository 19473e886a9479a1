from models import SLM, meta_model
from tests.helpers.scripts import run_script
from tests.helpers.small_models import for_each_config


@for_each_config
def test_a_meta_model_has_the_names_shapes_and_dtypes_of_a_model_and_no_memory(config):
    real = dict(SLM(config).named_parameters())
    meta = dict(meta_model(config).named_parameters())
    assert list(meta) == list(real)
    for name, weight in meta.items():
        assert weight.is_meta, name
        assert (weight.shape, weight.dtype) == (real[name].shape, real[name].dtype), name


MAKE_META_MODELS = """
import sys
from models import meta_model
from tests.helpers.small_models import CONFIGS
for config in CONFIGS.values():
    meta_model(config)
assert "torch._dynamo" not in sys.modules, "seconds of every start"
"""


def test_a_meta_model_does_not_load_torchs_compiler():
    run_script(MAKE_META_MODELS)
