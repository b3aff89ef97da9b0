"""What may be shared between actor and engine is decided from the layouts alone."""

import dataclasses

import pytest
from bridge import actor_side, engine_side
from layouts import model

from osft_mcore.actor.megatron_layout import actor_layouts
from osft_mcore.config.schema import ModelConfig, RolloutConfig, SyncConfig, TrainConfig
from osft_mcore.errors import WeightError
from osft_mcore.parallel.topology import Topology
from osft_mcore.rollout.vllm_layout import engine_layouts
from osft_mcore.train.weight_plan import alias_forbidden
from osft_mcore.weights.alias import Alias, choose_aliases, deliveries, delivery_lines, find_aliases
from osft_mcore.weights.params import vllm_layouts
from osft_mcore.weights.plan import make_plan

FOUR_GROUPS, TWO_GROUPS = model("qwen2", kv_heads=4), model("qwen2", kv_heads=2)


def test_all_but_fused_attention_coincides_at_equal_tensor_parallel_size() -> None:
    actor, engine = actor_side(FOUR_GROUPS, tp=2), engine_side(FOUR_GROUPS, tp=2)
    aliases = find_aliases(actor, engine)
    left = {(rank, name) for rank in engine for name in engine[rank]}
    left -= {(alias.rank, alias.dst_param) for alias in aliases}
    assert {name.split("self_attn.")[1] for _, name in left} == {
        "qkv_proj.weight",
        "qkv_proj.bias",
    }
    for alias in aliases:
        assert actor[alias.rank][alias.src_param] == engine[alias.rank][alias.dst_param]


def test_with_one_group_on_each_rank_everything_coincides() -> None:
    actor, engine = actor_side(TWO_GROUPS, tp=2), engine_side(TWO_GROUPS, tp=2)
    aliases = find_aliases(actor, engine)
    assert len(aliases) == sum(map(len, engine.values()))
    plan = make_plan(actor, engine, aliases=aliases)
    assert (plan.copies, plan.paddings) == ((), ())
    assert all(at.aliased and not at.local for at in plan.traffic().values())


def test_a_plan_with_aliases_copies_the_rest_as_before() -> None:
    actor, engine = (
        actor_side(FOUR_GROUPS, tp=2, pp=2, world=4),
        engine_side(FOUR_GROUPS, tp=2, world=4),
    )
    aliases = find_aliases(actor, engine)
    aliased = {(alias.rank, alias.dst_param) for alias in aliases}
    whole, rest = make_plan(actor, engine), make_plan(actor, engine, aliases=aliases)
    remote = [copy for copy in whole.copies if copy.src_rank != copy.dst_rank]
    assert [copy for copy in rest.copies if copy.src_rank != copy.dst_rank] == remote
    assert {(c.dst_rank, c.dst_param) for c in rest.copies}.isdisjoint(aliased)
    assert rest.digest != whole.digest
    padding = dict.fromkeys(engine, 0)
    for rows in set(whole.paddings) - set(rest.paddings):
        padding[rows.rank] += rows.length * FOUR_GROUPS.hidden
    for rank, moved in rest.traffic().items():
        before = whole.traffic()[rank]
        assert moved.aliased > 0
        assert moved.local + moved.aliased == before.local + padding[rank]
        assert (moved.sent, moved.received) == (before.sent, before.received)


def test_vocabularies_padded_differently_are_copied() -> None:
    actor = actor_side(TWO_GROUPS, tp=1, world=1)
    engine = engine_side(TWO_GROUPS, tp=1, world=1)
    assert Alias(
        rank=0,
        src_param="embedding.word_embeddings.weight",
        dst_param="model.embed_tokens.weight",
    ) in find_aliases(actor, engine)
    engine = {0: vllm_layouts(TWO_GROUPS, tp=1, tp_rank=0, vocab_padded=192)}
    found = {
        delivery.kind: delivery.reason
        for delivery in deliveries(actor, engine, find_aliases(actor, engine), forbidden="")
        if not delivery.aliased
    }
    assert found["model.embed_tokens.weight"] == (
        "the engine cuts or pads the vocabulary otherwise: rollout.tp, vocab_multiple"
    )


@pytest.mark.parametrize("mode", ["auto", "alias", "copy", "reload"])
def test_modes(mode: str) -> None:
    actor, engine = actor_side(FOUR_GROUPS, tp=2), engine_side(FOUR_GROUPS, tp=2)
    chosen = choose_aliases(mode, actor, engine)  # type: ignore[arg-type]
    assert chosen == (find_aliases(actor, engine) if mode in ("auto", "alias") else ())


def test_auto_gives_way_to_what_forbids_aliases_and_alias_does_not() -> None:
    actor, engine = actor_side(TWO_GROUPS, tp=2), engine_side(TWO_GROUPS, tp=2)
    assert choose_aliases("auto", actor, engine, forbidden="it may not") == ()
    with pytest.raises(WeightError, match=r"norm\.weight: it may not"):
        choose_aliases("alias", actor, engine, forbidden="it may not")
    [line] = delivery_lines(deliveries(actor, engine, (), forbidden="it may not"))
    assert line.startswith("copy 100.0%: embed_tokens, layers.*.input_layernorm, ")
    assert line.endswith(" (it may not)")


def test_lines_say_what_is_shared_and_why_the_rest_is_not() -> None:
    actor = actor_side(FOUR_GROUPS, tp=2, pp=2, world=4)
    engine = engine_side(FOUR_GROUPS, tp=2, world=4)
    lines = delivery_lines(deliveries(actor, engine, find_aliases(actor, engine), forbidden=""))
    assert [line.split(":")[0].split()[0] for line in lines] == ["alias", "copy", "copy"]
    qkv = "layers.*.self_attn.qkv_proj, layers.*.self_attn.qkv_proj.bias"
    assert lines[1].endswith("(other pipeline stages hold it)")
    assert qkv in lines[1]
    assert lines[2].endswith(f"{qkv} (the engine keeps the same rows in another order)")
    shares = [float(line.split("%")[0].split()[1]) for line in lines]
    assert sum(shares) == pytest.approx(100, abs=0.2)


def test_with_default_options_real_vocabularies_coincide_at_equal_sizes() -> None:
    """151936 and 128256 are no multiples of 128 * tp, Megatron-LM's padding."""
    for vocab, tp in ((151936, 2), (128256, 4), (50257, 8)):
        shape = dataclasses.replace(model("qwen2", kv_heads=8), vocab=vocab)
        topology = Topology(tp=tp, pp=1, dp=1, rollout_tp=tp)
        actor = actor_layouts(
            shape, topology, vocab_multiple=ModelConfig().vocab_multiple, transformer_engine=False
        )
        engine = engine_layouts(shape, topology)
        aliases = choose_aliases("alias", actor, engine)
        kinds = {d.kind for d in deliveries(actor, engine, aliases, forbidden="") if d.aliased}
        assert {"model.embed_tokens.weight", "lm_head.weight"} <= kinds


def test_weights_that_leave_the_device_are_copied() -> None:
    def reason(train: TrainConfig) -> str:
        return alias_forbidden(SyncConfig(), RolloutConfig(), train)

    assert reason(TrainConfig(offload="optimizer")) == ""
    assert reason(TrainConfig(offload="all")).startswith("train.offload=all puts the actor's wei")
