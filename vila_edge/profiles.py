"""The eras of VILA: what each does beyond the sizes (spec section 0). Which one a checkpoint is of is for export to say."""

from __future__ import annotations

from vila_edge.config import Profile

PROFILE_KEY = "vila_edge_profile"  # in config.json: a checkpoint of our own training says what it is

VILA_1_0 = Profile(
    era="v1.0",
    token_order="row_major",  # its projectors fold nothing
    tokenization="per_chunk",
    template="vicuna_v1",
    stop_tokens=("</s>",),
)

VILA_1_5 = Profile(
    era="vila1.5",
    token_order="column_major",
    tokenization="per_chunk",
    template="vicuna_v1",
    stop_tokens=("</s>",),
)

NVILA = Profile(
    era="nvila",
    token_order="row_major",
    tokenization="whole",
    template="qwen2",
    stop_tokens=("<|im_end|>",),
    image_lead="<image>",
    image_end="\n",
    tile_end="\n",
    strip_turns=True,
    video_as="video",
    frame_rule="rounded",
)

ERAS = {profile.era: profile for profile in (VILA_1_0, VILA_1_5, NVILA)}
