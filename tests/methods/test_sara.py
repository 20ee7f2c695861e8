"""SaRA: the smallest entries train, from the base's own values; what leaves them keeps its effect,
bit for bit; the low-rank term points where an SVD does."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from sparse_lora_dist.methods.protocol.form import Form, Site, Tensors
from sparse_lora_dist.methods.protocol.method import Method, RunContext
from sparse_lora_dist.methods.protocol.rewriting import Whole
from sparse_lora_dist.methods.sara import PAIRS, SaraOptions, first_of, nuclear_gradient, sara
from sparse_lora_dist.methods.shira import scattered

SITE = Site(name="q", in_features=40, out_features=28, rank=3)
N = 3 * (28 + 40)


def built(site: Site = SITE, total_steps: int = 10, **options: float | None) -> Method:
    context = RunContext(total_steps=total_steps, warmup_steps=0, learning_rate=1e-3, sites=(site,))
    return sara(SaraOptions(**{f"sara_{k}": v for k, v in options.items()}), context)


def first(form: Form) -> dict[str, Tensor]:
    """All that there is before anything is chosen."""
    kept = {k: torch.zeros(spec.shape, dtype=spec.dtype) for k, spec in form.kept.items()}
    drawn = form.drawn(0, torch.device("cpu"))
    return kept | drawn | {k: torch.zeros(spec.shape) for k, spec in form.tensors.items()}


def rewritten(
    method: Method, weight_OI: Tensor, tensors: Tensors, step: int
) -> tuple[dict[str, Tensor], float | None]:
    """The site's tensors from now on, and the share that is new."""
    assert method.rewriting is not None and method.rewriting.at(step)
    whole = Whole(
        site=SITE,
        index=0,
        step=step,
        tensors=tensors,
        scale=1.0,
        weight_OI=lambda: weight_OI,
        generator=torch.Generator(),
    )
    done = method.rewriting.write(whole)
    changed = {k: t for k, t in done.tensors.items() if t.dtype != tensors[k].dtype}
    assert not changed and all(t.shape == tensors[k].shape for k, t in done.tensors.items())
    return dict(tensors) | dict(done.tensors), done.log_values.get("reselected")


def change_of(form: Form, tensors: Tensors, site: Site = SITE) -> Tensor:
    """D_OI, bit for bit: each entry of a product with the identity is a sum of one."""
    return form.delta(torch.eye(site.in_features), tensors, 1.0).t()


def weight(seed: int = 1) -> Tensor:
    return torch.randn(28, 40, generator=torch.Generator().manual_seed(seed))


def trained(values_N: Tensor) -> Tensor:
    return 0.3 * torch.randn(values_N.shape, generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize(("reselect", "density"), [(0.5, None), (None, None), (0.5, 0.8)])
def test_at_step_0_the_smallest_are_chosen_and_the_weight_is_the_bases_with_its_signs(
    reselect: float | None, density: float | None
) -> None:
    method, weight_OI = built(reselect=reselect, density=density), weight()
    form = method.form(SITE)
    tensors, new = rewritten(method, weight_OI, first(form), 0)
    change_OI, chosen_N = change_of(form, tensors), tensors["sara_places"].long()
    assert not change_OI.any() and new is None
    assert torch.equal(weight_OI + change_OI, weight_OI)
    sizes, at = weight_OI.abs().flatten(), torch.zeros(28 * 40, dtype=torch.bool)
    at[chosen_N] = True
    assert int(at.sum()) == len(chosen_N) == (N if density is None else int(0.8 * 28 * 40))
    assert sizes[at].max() < sizes[~at].min()
    # Else there was no sign to keep.
    assert (weight_OI.flatten()[chosen_N] < 0).any()


def test_what_a_step_moves_are_the_chosen_entries() -> None:
    method, weight_OI = built(), weight()
    form = method.form(SITE)
    tensors, _ = rewritten(method, weight_OI, first(form), 0)
    tensors["sara_values"] = trained(tensors["sara_values"])
    change_OI = change_of(form, tensors)
    assert torch.equal(change_OI.flatten()[tensors["sara_places"].long()], tensors["sara_values"])
    assert int(change_OI.count_nonzero()) == N


@pytest.mark.parametrize("density", [None, 0.8])
def test_choosing_anew_leaves_the_delta_as_it_is_and_takes_the_smallest_sums(
    density: float | None,
) -> None:
    method, weight_OI = built(density=density), weight()
    form = method.form(SITE)
    before, _ = rewritten(method, weight_OI, first(form), 0)
    before["sara_values"] = trained(before["sara_values"])
    was_OI = change_of(form, before)
    after, new = rewritten(method, weight_OI, before, 5)
    assert torch.equal(change_of(form, after), was_OI)

    count = len(before["sara_places"])
    sums = (weight_OI + was_OI).abs().flatten()
    (wanted_N,) = torch.where(sums <= sums.kthvalue(count).values)
    places_N = after["sara_places"].long()
    assert torch.equal(places_N, wanted_N)
    old, now = set(before["sara_places"].tolist()), set(places_N.tolist())
    assert 0 < len(now - old) < count
    assert new == pytest.approx(len(now - old) / count)
    # Those that stay have their value, those that are new begin at nothing.
    assert torch.equal(after["sara_values"], was_OI.flatten()[places_N])
    fresh = torch.tensor([place not in old for place in places_N.tolist()])
    assert not after["sara_values"][fresh].any() and after["sara_values"][~fresh].all()
    # Those that leave are frozen, at places of their own.
    held = dict(
        zip(after["sara_left_places"].tolist(), after["sara_left_values"].tolist(), strict=True)
    )
    assert len(held) == len(after["sara_left_places"]) and not now & held.keys()
    assert {place for place, value in held.items() if value} == old - now


def test_what_comes_back_takes_its_value_with_it() -> None:
    method, weight_OI = built(), weight()
    form = method.form(SITE)
    before, _ = rewritten(method, weight_OI, first(form), 0)
    before["sara_values"] = trained(before["sara_values"])
    after, _ = rewritten(method, weight_OI, before, 5)
    # As if the base were such that one which left is nearest to zero now.
    place = int(after["sara_left_places"][after["sara_left_values"] != 0][0])
    was_OI = change_of(form, after)
    other_OI = weight_OI.flatten().index_put((torch.tensor([place]),), -was_OI.flatten()[place])
    again, _ = rewritten(method, other_OI.view(28, 40), after, 5)
    at = again["sara_places"].tolist().index(place)
    assert again["sara_values"][at] == was_OI.flatten()[place] != 0
    assert torch.equal(change_of(form, again), was_OI)


def test_the_delta_is_the_naive_one_and_only_what_trains_has_a_gradient() -> None:
    method = built()
    form = method.form(SITE)
    tensors, _ = rewritten(method, weight(), first(form), 0)
    tensors["sara_values"] = trained(tensors["sara_values"])
    tensors, _ = rewritten(method, weight(), tensors, 5)
    leaf = tensors["sara_values"].clone().requires_grad_()
    naive_OI = torch.zeros(28 * 40)
    for part in ("", "left_"):
        for place, value in zip(
            tensors[f"sara_{part}places"], tensors[f"sara_{part}values"], strict=True
        ):
            naive_OI[place] += value
    dense_OI = naive_OI.view(28, 40).requires_grad_()
    x, above = torch.randn(2, 5, 40), torch.randn(2, 5, 28)
    y, wanted = form.delta(x, tensors | {"sara_values": leaf}, 1.0), x @ dense_OI.t()
    torch.testing.assert_close(y, wanted)
    (ours,) = torch.autograd.grad(y, leaf, above)
    (whole,) = torch.autograd.grad(wanted, dense_OI, above)
    torch.testing.assert_close(ours, whole.flatten()[tensors["sara_places"].long()])


def test_equal_entries_are_taken_from_everywhere() -> None:
    """All that lie at zero in a quantised base are equal, and more than are wanted."""
    places_N = first_of(torch.zeros(64 * 96), 5 * 160)
    assert torch.equal(places_N, places_N.unique()) and len(places_N) == 5 * 160
    assert len((places_N // 96).unique()) == 64 and len((places_N % 96).unique()) == 96


def test_it_is_chosen_once_more_or_never() -> None:
    at = {share: built(reselect=share).rewriting for share in (0.5, 0.25, 0.0, None)}
    steps = {k: [s for s in range(11) if r is not None and r.at(s)] for k, r in at.items()}
    assert steps == {0.5: [0, 5], 0.25: [0, 2], 0.0: [0], None: [0]}
    assert set(built(reselect=None).form(SITE).kept) == {"sara_places"}
    # There is room for one departure, so the run's length must not change before another.
    assert not built().redraws and built(reselect=None).redraws


def nuclear(values_N: Tensor, places_N: Tensor, shape: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """(what the penalty gives, U min(Sigma / delta, 1) V^T by an SVD), both at the places."""
    tensors = {"sara_values": values_N, "sara_places": places_N, "sara_shape": torch.tensor(shape)}
    u, sigma, v_t = torch.linalg.svd(scattered(values_N, places_N, *shape), full_matrices=False)
    kept = sigma[:PAIRS][sigma[:PAIRS] > 1e-4 * sigma[0]]
    exact_OI = u * (sigma / kept[-1]).clamp(max=1.0) @ v_t
    return nuclear_gradient(tensors), exact_OI.flatten()[places_N]


@pytest.mark.parametrize("rank", [1, 3, PAIRS])
def test_of_a_matrix_of_low_rank_the_low_rank_term_is_exact(rank: int) -> None:
    generator = torch.Generator().manual_seed(rank)
    left_OR = torch.randn(28, rank, generator=generator)
    whole_OI = left_OR @ torch.randn(rank, 40, generator=generator)
    ours, exact = nuclear(whole_OI.flatten(), torch.arange(28 * 40), (28, 40))
    torch.testing.assert_close(ours, exact, rtol=1e-3, atol=1e-4)


def test_of_scattered_entries_the_low_rank_term_points_where_an_svd_does() -> None:
    generator = torch.Generator().manual_seed(3)
    places_N = torch.randperm(96 * 128, generator=generator)[: 4 * 224].sort().values
    values_N = torch.randn(len(places_N), generator=generator)
    ours, exact = nuclear(values_N, places_N, (96, 128))
    assert torch.cosine_similarity(ours, exact, dim=0) > 0.999
    # Following it makes the nuclear norm smaller.
    norms = [
        torch.linalg.svdvals(scattered(values_N - rate * ours, places_N, 96, 128)).sum()
        for rate in (0.0, 0.01)
    ]
    assert norms[1] < norms[0]


def test_the_low_rank_term_is_weighed_is_nothing_at_nothing_and_off_unless_asked_for() -> None:
    assert built().penalty is None
    one, three = built(nuclear=1.0), built(nuclear=3.0)
    assert one.penalty is not None and three.penalty is not None
    tensors, _ = rewritten(one, weight(), first(one.form(SITE)), 0)
    assert not one.penalty(tensors)["sara_values"].any()
    tensors["sara_values"] = trained(tensors["sara_values"])
    gradient = one.penalty(tensors)["sara_values"]
    assert gradient.all() and gradient.shape == (N,)
    torch.testing.assert_close(three.penalty(tensors)["sara_values"], 3.0 * gradient)
    # Of the trained part alone.
    after, _ = rewritten(one, weight(), tensors, 5)
    without = after | {"sara_left_values": torch.zeros_like(after["sara_left_values"])}
    ours, theirs = one.penalty(after), one.penalty(without)
    assert torch.equal(ours["sara_values"], theirs["sara_values"])


@pytest.mark.parametrize(
    ("out", "wide", "share", "as_lora"),
    [
        (768, 768, 5898, 12_288),
        (3072, 768, 23_592, 30_720),
        (4096, 4096, 167_772, 65_536),
        (11008, 4096, 450_887, 120_832),
    ],
)
def test_parameters_are_those_of_lora_or_a_share_of_the_weight(
    out: int, wide: int, share: int, as_lora: int
) -> None:
    site = Site(name="q", in_features=wide, out_features=out, rank=8)
    for density, count in ((None, as_lora), (0.01, share)):
        form = built(site, density=density).form(site)
        assert {k: spec.shape for k, spec in form.tensors.items()} == {"sara_values": (count,)}
        assert all(spec.shape == (count,) for spec in form.kept.values())


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("density", 1.0, r"sara_density must be in \(0, 1\), got 1.0"),
        ("density", 0.0, r"sara_density must be in \(0, 1\), got 0.0"),
        ("reselect", 1.0, r"sara_reselect must be in \[0, 1\), got 1.0"),
        ("nuclear", -1.0, "sara_nuclear must be at least 0, got -1.0"),
        ("nuclear", float("nan"), "sara_nuclear must be at least 0, got nan"),
        (
            "reselect",
            0.01,
            "the run's 10 steps, which is step 0,.* Take 0.5 .* or 0 to select once",
        ),
        (
            "reselect",
            0.99,
            "the run's 10 steps, which is step 10,.* Take 0.5 .* or 0 to select once",
        ),
    ],
)
def test_wrong_numbers_are_refused(name: str, value: float, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        built(**{name: value})


def test_all_problems_are_told_at_once_and_a_weight_must_have_room() -> None:
    with pytest.raises(ValueError, match="--sara_density .*; --sara_nuclear"):
        SaraOptions(sara_density=2.0, sara_nuclear=-1.0)
    with pytest.raises(
        ValueError, match="q is 28 x 40. --rank 17 makes 1,156 .* Take --rank 16 or"
    ):
        built(replace(SITE, rank=17))
    built(replace(SITE, rank=16))


def test_a_third_choice_for_which_there_is_no_room_is_refused() -> None:
    """As after --reset schedule."""
    method, weight_OI = built(), weight()
    form = method.form(SITE)
    tensors, _ = rewritten(method, weight_OI, first(form), 0)
    with pytest.raises(ValueError, match="more entries are no longer trained"):
        for _ in range(4):
            tensors["sara_values"] = 1.0 + tensors["sara_values"].abs()
            tensors, _ = rewritten(method, weight_OI, tensors, 5)
