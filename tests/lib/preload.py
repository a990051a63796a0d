"""What a forked `scorer` finds imported already: see tests.lib.command."""

import transformers.models.auto.modeling_auto
import transformers.models.auto.tokenization_auto
import transformers.models.gpt2.modeling_gpt2
import transformers.tokenization_utils_tokenizers  # noqa: F401
