"""Every objective against its paper's equation, transcribed in plain Python, a token and a pair at a time.

An answer is a list of tokens, each with the policy's and the reference's distribution over a small vocabulary, and the
transcriptions start there: they share nothing with what they are compared to.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpo_jax.losses import LOSSES, estimate_kl, make_loss
from dpo_jax.losses.batchwise import follow_margins, follow_rewards

BATCHES, PAIRS, TOKENS, WORDS = 1000, 4, 5, 4


# --- answers ---------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Answer:
    tokens: list[int]
    pi: list[list[float]]  # the policy's distribution at each token
    ref: list[list[float]]


def draw(seed, answers):
    """Distributions [B, P, K, T, V] of both models, tokens [B, P, K, T], lengths [B, P, K], presence [B, P]."""
    rng = np.random.default_rng(seed)
    shape = (BATCHES, PAIRS, answers)
    models = [rng.dirichlet(np.full(WORDS, 0.8), (*shape, TOKENS)) for _ in range(2)]
    models = [(each + 1e-3) / (each + 1e-3).sum(-1, keepdims=True) for each in models]
    present = rng.random((BATCHES, PAIRS)) < 0.8
    present[:, 0] = True
    lengths = np.where(present[..., None], rng.integers(1, TOKENS + 1, shape), 0)
    return *models, rng.integers(0, WORDS, (*shape, TOKENS)), lengths, present


class Drawn:
    """1,000 random batches, as lists of answers and as the arrays that losses are called with."""

    def __init__(self, seed=0, answers=2, unpaired=False):
        pi, ref, tokens, lengths, self.present = draw(seed, answers)
        if unpaired:  # the one or the other answer of each is not there
            kept = np.random.default_rng(seed + 1).integers(0, 2, lengths.shape[:2])
            lengths = np.where(np.arange(2) == kept[..., None], lengths, 0)
        self.lengths = lengths
        self.batches = [
            [
                [
                    Answer(*(each[b, p, k, : lengths[b, p, k]].tolist() for each in (tokens, pi, ref)))
                    for k in range(lengths.shape[2])
                ]
                for p in range(PAIRS)
                if self.present[b, p]
            ]
            for b in range(BATCHES)
        ]
        there = np.arange(TOKENS) < lengths[..., None]
        shared = np.arange(TOKENS) < lengths.min(-1)[..., None, None]
        logs = [np.log(np.take_along_axis(each, tokens[..., None], -1)[..., 0]) for each in (pi, ref)]
        self.policy, self.reference = ((each * there).sum(-1) for each in logs)
        self.sums = {
            "shared_logps": (logs[0] * shared).sum(-1),
            "reference_shared_logps": (logs[1] * shared).sum(-1),
            "log_collision": (np.log((pi**2).sum(-1)) * there).sum(-1),
            "sequence_kl": ((ref * np.log(ref / pi)).sum(-1) * there).sum(-1),
        }

    def given(self, kl, running):
        """What losses may ask for besides, by name, a row a batch."""
        return self.sums | {"present": self.present, "kl": kl, "running": running}


@functools.cache
def drawn(**kwargs):
    return Drawn(**kwargs)


# --- what the equations are made of ----------------------------------------------------------------------------------


def S(x):
    return 1 / (1 + math.exp(-x)) if x > 0 else math.exp(x) / (1 + math.exp(x))


def log_S(x):
    return -math.log1p(math.exp(-x)) if x > 0 else x - math.log1p(math.exp(x))


def prob(answer, model):
    """pi(y|x), the product over tokens."""
    return math.prod(words[token] for words, token in zip(getattr(answer, model), answer.tokens, strict=True))


def ratio(answer):
    """pi(y|x) / pi_ref(y|x)."""
    return prob(answer, "pi") / prob(answer, "ref")


def reward(answer, beta):
    """beta log [pi(y|x) / pi_ref(y|x)]."""
    return beta * math.log(ratio(answer))


def size(answer):
    return len(answer.tokens)


# --- losses of a pair: w and r, the better and the worse answer ------------------------------------------------------


def sigmoid(w, r, beta=0.1, label_smoothing=0.0):
    # 2305.18290 Eq. 7; cDPO Eq. 3.
    margin = reward(w, beta) - reward(r, beta)
    return -(1 - label_smoothing) * log_S(margin) - label_smoothing * log_S(-margin)


def robust(w, r, beta=0.1, label_smoothing=0.1):
    # 2403.00409: the loss of the pair and of the flipped one, without bias.
    kept, flipped = sigmoid(w, r, beta), sigmoid(r, w, beta)
    return ((1 - label_smoothing) * kept - label_smoothing * flipped) / (1 - 2 * label_smoothing)


def hinge(w, r, beta=0.1):
    return max(0.0, 1 - (reward(w, beta) - reward(r, beta)))


def ipo(w, r, beta=0.1, average=True):
    # 2310.12036 Eq. 17: (h - 1/(2 tau))^2, h = log [pi(w) ref(r) / (pi(r) ref(w))].
    if not average:
        h = math.log(prob(w, "pi") * prob(r, "ref") / (prob(r, "pi") * prob(w, "ref")))
    else:  # geometric means over tokens
        h = math.log(ratio(w) ** (1 / size(w)) / ratio(r) ** (1 / size(r)))
    return (h - 1 / (2 * beta)) ** 2


def sigmoid_norm(w, r, beta=5.0, label_smoothing=0.0):
    # 2411.15124: beta/|y| log ratio.
    margin = beta / size(w) * math.log(ratio(w)) - beta / size(r) * math.log(ratio(r))
    return -(1 - label_smoothing) * log_S(margin) - label_smoothing * log_S(-margin)


def exo_pair(w, r, beta=0.1, label_smoothing=1e-3):
    # 2402.00856: KL(p_f || p_r) over the two, p_f = softmax(beta log ratio), p_r the smoothed label.
    p_f = [ratio(w) ** beta / (ratio(w) ** beta + ratio(r) ** beta)]
    p_f.append(1 - p_f[0])
    p_r = [1 - label_smoothing, label_smoothing]
    return sum(f * (math.log(f) - math.log(q)) for f, q in zip(p_f, p_r, strict=True))


def nca_pair(w, r, beta=0.1):
    # 2402.05369, K = 2, all reward on the better one: -log S(r_w) - (1/K) sum_i log S(-r_i).
    return -log_S(reward(w, beta)) - sum(log_S(-reward(each, beta)) for each in (w, r)) / 2


def sppo_hard(w, r, beta=1e-3):
    # 2405.00675: (log ratio - eta (P(y beats pi) - 1/2))^2 with win rates 1 and 0.
    eta = 1 / beta
    return sum((math.log(ratio(y)) - eta * (wins - 1 / 2)) ** 2 for y, wins in ((w, 1), (r, 0)))


def apo_zero(w, r, beta=0.1):
    return (1 - S(reward(w, beta)) if size(w) else 0) + (S(reward(r, beta)) if size(r) else 0)


def apo_down(w, r, beta=0.1):
    return S(reward(w, beta)) + 1 - S(reward(w, beta) - reward(r, beta))


def discopop(w, r, beta=0.1, tau=0.05):
    # 2406.08414: LRML, (1 - S(rho / tau)) logistic + S(rho / tau) exponential.
    rho = reward(w, beta) - reward(r, beta)
    return (1 - S(rho / tau)) * math.log(1 + math.exp(-rho)) + S(rho / tau) * math.exp(-rho)


def dpo_positive(w, r, beta=0.1, penalty=50.0):
    # 2402.13228 Eq. 3: max(0, log [ref(w) / pi(w)]).
    lost = max(0.0, math.log(prob(w, "ref") / prob(w, "pi")))
    return -log_S(beta * (math.log(ratio(w)) - math.log(ratio(r)) - penalty * lost))


def sequence_kl(answer):
    """D_SeqKL(ref || pi): KL of the next token's distribution, summed along the answer."""
    total = 0.0
    for ref, pi in zip(answer.ref, answer.pi, strict=True):
        total += sum(q * math.log(q / p) for q, p in zip(ref, pi, strict=True))
    return total


def tdpo1(w, r, beta=0.1):
    # 2404.11999: -log S(u - delta), delta = beta D(r) - beta D(w).
    u, delta = reward(w, beta) - reward(r, beta), beta * sequence_kl(r) - beta * sequence_kl(w)
    return -log_S(u - delta)


def tdpo2(w, r, beta=0.1, kl_weight=0.5):
    # 2404.11999: -log S(u - alpha delta_2), D(w) without gradient, which the value does not show.
    u, delta = reward(w, beta) - reward(r, beta), beta * sequence_kl(r) - beta * sequence_kl(w)
    return -log_S(u - kl_weight * delta)


def simpo(w, r, beta=2.0, gamma=1.0, label_smoothing=0.0):
    # 2405.14734 Eq. 6.
    margin = beta / size(w) * math.log(prob(w, "pi")) - beta / size(r) * math.log(prob(r, "pi")) - gamma
    return -(1 - label_smoothing) * log_S(margin) - label_smoothing * log_S(-margin)


def cpo(w, r, beta=0.1, label_smoothing=0.0, nll_weight=1.0, nll_average=True):
    # 2401.08417: L_prefer under a uniform reference, and L_NLL.
    margin = beta * math.log(prob(w, "pi") / prob(r, "pi"))
    prefer = -(1 - label_smoothing) * log_S(margin) - label_smoothing * log_S(-margin)
    return prefer + nll_weight * nll(w, nll_average)


def orpo(w, r, beta=0.1, nll_weight=1.0):
    # 2403.07691: L_SFT + lambda L_OR, odds(y) = P(y) / (1 - P(y)), P the geometric mean over tokens.
    odds = [p / (1 - p) for p in (prob(y, "pi") ** (1 / size(y)) for y in (w, r))]
    return nll_weight * nll(w) - beta * log_S(math.log(odds[0] / odds[1]))


def nll(answer, average=True):
    return -math.log(prob(answer, "pi")) / (size(answer) if average else 1)


# --- modifiers of a pair's loss --------------------------------------------------------------------------------------


def f_prime(divergence, alpha, u):
    """2309.16240, table 1, with the constants that cancel in a margin."""
    return {
        "reverse_kl": math.log(u) + 1,
        "forward_kl": -1 / u,
        "js_divergence": math.log(2 * u / (1 + u)),
        "alpha_divergence": (1 - u**-alpha) / alpha,
    }[divergence]


def of_divergence(loss_of_margin):
    def loss(w, r, beta=0.1, divergence="reverse_kl", divergence_alpha=0.5):
        h = f_prime(divergence, divergence_alpha, ratio(w)) - f_prime(divergence, divergence_alpha, ratio(r))
        return loss_of_margin(h, beta)

    return loss


def ld_sigmoid(w, r, beta=0.1, ld_alpha=0.3):
    # 2409.06411: tokens up to the shorter length count once, those beyond alpha times.
    shorter = min(size(w), size(r))

    def modified(answer, model):
        logps = [math.log(words[token]) for words, token in zip(getattr(answer, model), answer.tokens, strict=True)]
        return sum(logps[:shorter]) + ld_alpha * sum(logps[shorter:])

    margin = (modified(w, "pi") - modified(w, "ref")) - (modified(r, "pi") - modified(r, "ref"))
    return -log_S(beta * margin)


def wpo_sigmoid(w, r, beta=0.1):
    # 2406.11827: each pair's loss times w(y_w) w(y_l), aligned to sampling from the policy.
    def weight(answer):
        total = 0.0
        for words, token in zip(answer.pi, answer.tokens, strict=True):
            total += math.log(words[token]) - math.log(sum(p * p for p in words))
        return math.exp(total / size(answer))

    return weight(w) * weight(r) * sigmoid(w, r, beta)


def rpo(w, r, beta=0.1, nll_weight=1.0, nll_average=True):
    # 2404.19733: DPO and alpha times the negative log-likelihood of the winner, over its length.
    return sigmoid(w, r, beta) + nll_weight * nll(w, nll_average)


# --- losses of a batch -----------------------------------------------------------------------------------------------


def each_pair(loss):
    """A loss of a pair as one of a batch."""
    return lambda pairs, state, **options: [loss(*pair, **options) for pair in pairs]


def mpo(pairs, state, beta=0.1):
    # 2411.10442: preference, quality and generation losses, weighed.
    quality = bco_pair(pairs, state, beta)
    tokens = sum(size(w) for w, _ in pairs)
    generation = [-math.log(prob(w, "pi")) * len(pairs) / tokens for w, _ in pairs]
    preference = [sigmoid(w, r, beta) for w, r in pairs]
    return [0.8 * p + 0.2 * q + g for p, q, g in zip(preference, quality, generation, strict=True)]


def sft(pairs, state):
    # The mean over the batch's tokens, as a mean over pairs.
    tokens = max(1, sum(size(w) for w, _ in pairs))
    return [-math.log(prob(w, "pi")) * len(pairs) / tokens for w, _ in pairs]


def bco_pair(pairs, state, beta=0.1):
    # 2404.04656: cross-entropy of a classifier whose logit is the reward less its shift.
    delta, found = state["shift"], []
    for w, r in pairs:
        good = -math.log(S(reward(w, beta) - delta)) if size(w) else 0.0
        bad = -math.log(1 - S(reward(r, beta) - delta)) if size(r) else 0.0
        found.append(good + bad)
    return found


def kto(pairs, state, beta=0.1, desirable_weight=1.0, undesirable_weight=1.0):
    # 2402.01306 Eq. 7: lambda_y - v(x, y), of a pair the mean over its two examples.
    found = []
    for w, r in pairs:
        examples = []
        if size(w):
            examples.append(desirable_weight - desirable_weight * S(beta * (math.log(ratio(w)) - state["kl"])))
        if size(r):
            examples.append(undesirable_weight - undesirable_weight * S(beta * (state["kl"] - math.log(ratio(r)))))
        found.append(sum(examples) / len(examples))
    return found


def beta_dpo(pairs, state, beta=0.1, sensitivity=0.6):
    # 2407.08639: beta_batch = [1 + alpha (mean M - M_0)] beta_0, not below 0.001.
    margins = [math.log(ratio(w) / ratio(r)) for w, r in pairs]
    chosen = max(1e-3, (1 + sensitivity * (sum(margins) / len(margins) - state["margin"])) * beta)
    return [-log_S(chosen * margin) for margin in margins]


def quantiles(better, worse, beta, label_smoothing):
    """Logistic loss of sorted values against sorted values, the k-th smallest at the k-th place."""
    found = []
    for u, v in zip(sorted(better), sorted(worse), strict=True):
        margin = beta * (u - v)
        found.append(-(1 - label_smoothing) * log_S(margin) - label_smoothing * log_S(-margin))
    return found


def aot(pairs, state, beta=0.1, label_smoothing=0.0):
    # 2406.05882: log pi(w)/pi(r) against log ref(w)/ref(r), as distributions over pairs.
    policy = [math.log(prob(w, "pi") / prob(r, "pi")) for w, r in pairs]
    reference = [math.log(prob(w, "ref") / prob(r, "ref")) for w, r in pairs]
    return quantiles(policy, reference, beta, label_smoothing)


def aot_unpaired(pairs, state, beta=0.1, label_smoothing=0.0):
    # 2406.05882: log ratios of better answers against those of worse ones.
    better, worse = ([math.log(ratio(pair[k])) for pair in pairs] for k in range(2))
    return quantiles(better, worse, beta, label_smoothing)


def plackett_luce(rankings, state, beta=0.1):
    # 2305.18290, appendix A.3: the product over k of exp(r_k) / sum_{j >= k} exp(r_j).
    found = []
    for answers in rankings:
        weights = [ratio(y) ** beta for y in answers]
        found.append(-math.log(math.prod(weights[k] / sum(weights[k:]) for k in range(len(weights)))))
    return found


# --- the comparison --------------------------------------------------------------------------------------------------

BY_PAIR = (sigmoid, robust, hinge, ipo, sigmoid_norm, exo_pair, nca_pair, sppo_hard, apo_zero, apo_down, discopop)
BY_PAIR += (dpo_positive, tdpo1, tdpo2, simpo, cpo, orpo)
BY_BATCH = (bco_pair, kto, beta_dpo, aot, aot_unpaired, plackett_luce, sft)
PAPERS = {each.__name__: each_pair(each) for each in BY_PAIR} | {each.__name__: each for each in BY_BATCH}

MARGINS = {
    "sigmoid": lambda h, beta: -log_S(beta * h),
    "hinge": lambda h, beta: max(0.0, 1 - beta * h),
    "discopop": lambda h, beta: (  # its two factors' product as one exponential: the second alone overflows
        (1 - S(beta * h / 0.05)) * -log_S(beta * h) + math.exp(log_S(beta * h / 0.05) - beta * h)
    ),
}
OPTIONS = [
    ("sigmoid", {"beta": 0.7, "label_smoothing": 0.2}),
    ("robust", {"beta": 1.3, "label_smoothing": 0.3}),
    ("hinge", {"beta": 0.4}),
    ("ipo", {"beta": 0.6}),
    ("ipo", {"beta": 0.2, "average": False}),
    ("sigmoid_norm", {"beta": 2.0, "label_smoothing": 0.1}),
    ("exo_pair", {"beta": 0.5, "label_smoothing": 0.2}),
    ("nca_pair", {"beta": 0.5}),
    ("sppo_hard", {"beta": 0.4}),
    ("apo_zero", {"beta": 1.1}),
    ("apo_down", {"beta": 1.1}),
    ("discopop", {"beta": 0.3, "tau": 0.5}),
    ("dpo_positive", {"beta": 0.2, "penalty": 3.0}),
    ("tdpo1", {"beta": 0.8}),
    ("tdpo2", {"beta": 0.8, "kl_weight": 1.4}),
    ("simpo", {"beta": 1.5, "gamma": 0.2, "label_smoothing": 0.1}),
    ("cpo", {"beta": 0.4, "label_smoothing": 0.1, "nll_weight": 0.3}),
    ("cpo", {"nll_average": False}),
    ("orpo", {"beta": 0.6, "nll_weight": 0.5}),
    ("bco_pair", {"beta": 0.5}),
    ("kto", {"beta": 0.5, "desirable_weight": 1.3, "undesirable_weight": 0.7}),
    ("beta_dpo", {"beta": 0.4, "sensitivity": 0.2}),
    ("aot", {"beta": 0.5, "label_smoothing": 0.2}),
    ("aot_unpaired", {"beta": 0.5, "label_smoothing": 0.2}),
    ("plackett_luce", {"beta": 0.7}),
]


def state_of(batch):
    """What a batch is given from outside itself: a KL estimate, a shift of rewards, a mean margin."""
    return {"kl": 0.05 * (batch % 40), "shift": 0.1 * (batch % 13 - 6), "margin": 0.2 * (batch % 11 - 5)}


def assert_equals_paper(data, name, options, paper):
    jax.config.update("jax_enable_x64", True)
    try:
        objective = make_loss(name, options)
        states = [state_of(batch) for batch in range(BATCHES)]
        kl, shift, margin = (np.array([state[key] for state in states]) for key in ("kl", "shift", "margin"))
        given = data.given(kl, {"bco_pair": {"value": shift}, "beta_dpo": {"value": margin}})
        given = {need: given[need] for need in objective.needs}
        arrays = jax.tree.map(jnp.asarray, (data.policy, data.reference, data.lengths, given))
        found = np.asarray(jax.vmap(lambda p, r, n, given: objective(p, r, lengths=n, **given))(*arrays))
    finally:
        jax.config.update("jax_enable_x64", False)
    assert found.dtype == np.float64
    expected = [paper(pairs, state) for pairs, state in zip(data.batches, states, strict=True)]
    np.testing.assert_allclose(found[data.present], np.concatenate(expected), rtol=1e-9, atol=1e-13)


@pytest.mark.parametrize(("name", "options"), [(name, {}) for name in LOSSES] + OPTIONS)
def test_loss_equals_its_paper(name, options):
    data = drawn(answers=4) if name == "plackett_luce" else drawn()
    assert_equals_paper(data, name, options, functools.partial(PAPERS[name], **options))


@pytest.mark.parametrize("name", ["kto", "bco_pair", "apo_zero"])
def test_loss_of_single_answers_equals_its_paper(name):
    assert_equals_paper(drawn(seed=3, unpaired=True), name, {"beta": 0.5}, functools.partial(PAPERS[name], beta=0.5))


def test_likelihood_of_the_desirable_among_single_answers_is_the_mean_over_their_tokens():
    assert_equals_paper(drawn(seed=3, unpaired=True), "sft", {}, sft)


@pytest.mark.parametrize("name", MARGINS)
@pytest.mark.parametrize(
    "options",
    [
        {"divergence": "reverse_kl"},
        {"divergence": "forward_kl"},
        {"divergence": "js_divergence"},
        {"divergence": "alpha_divergence"},
        {"divergence": "alpha_divergence", "divergence_alpha": 0.2},
    ],
)
def test_divergence_equals_its_paper(name, options):
    options = options | {"beta": 0.005}
    assert_equals_paper(drawn(), name, options, functools.partial(each_pair(of_divergence(MARGINS[name])), **options))


@pytest.mark.parametrize(
    ("paper", "options"),
    [
        (ld_sigmoid, {"ld_alpha": 0.3}),
        (ld_sigmoid, {"ld_alpha": 0.0}),
        (wpo_sigmoid, {"wpo": True}),
        (rpo, {"nll_weight": 0.7}),
        (rpo, {"nll_weight": 0.7, "nll_average": False}),
    ],
)
def test_modifier_equals_its_paper(paper, options):
    taken = {option: value for option, value in options.items() if option != "wpo"}
    assert_equals_paper(drawn(), "sigmoid", options, functools.partial(each_pair(paper), **taken))


def test_weighted_sum_equals_its_paper():
    assert_equals_paper(drawn(), "sigmoid*0.8,bco_pair*0.2,sft", {"beta": 0.5}, functools.partial(mpo, beta=0.5))


# --- what carries over, and KTO's estimate ---------------------------------------------------------------------------


@pytest.fixture
def x64():
    jax.config.update("jax_enable_x64", True)
    yield
    jax.config.update("jax_enable_x64", False)


@pytest.mark.parametrize("unpaired", [False, True])
def test_kl_estimate_equals_its_paper(x64, unpaired):
    # 2402.01306: max(0, 1/m sum_i log [pi(y'_i) / ref(y'_i)]) over mismatched answers.
    data = drawn(seed=3, unpaired=True) if unpaired else drawn()
    arrays = map(jnp.asarray, (data.policy, data.reference, data.lengths, data.present))
    found = jax.vmap(estimate_kl)(*arrays)
    expected = []
    for pairs in data.batches:
        ratios = [math.log(ratio(answer)) for pair in pairs for answer in pair if size(answer)]
        expected.append(max(0.0, sum(ratios) / len(ratios)))
    assert 0 < np.mean(np.array(expected) == 0) < 1
    np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-13)


def followed(follow, start, data, beta):
    """The value after each batch."""
    follow, values, state = jax.jit(functools.partial(follow, beta=beta)), [], start
    for batch in range(BATCHES):
        arrays = (jnp.asarray(each[batch]) for each in (data.policy, data.reference))
        lengths, present = jnp.asarray(data.lengths[batch]), jnp.asarray(data.present[batch])
        state = follow(state, *arrays, lengths=lengths, present=present)
        values.append(float(state["value"]))
    return values


@pytest.mark.parametrize("unpaired", [False, True])
def test_reward_shift_equals_its_paper(x64, unpaired):
    # 2404.04656: (E of rewards of good answers + E of rewards of bad ones) / 2, expectations over all seen so far.
    data, seen, expected = (drawn(seed=3, unpaired=True) if unpaired else drawn()), ([], []), []
    for pairs in data.batches:
        for pair in pairs:
            for rewards, answer in zip(seen, pair, strict=True):
                rewards += [reward(answer, 0.3)] if size(answer) else []
        expected.append(sum(math.fsum(each) / max(len(each), 1) for each in seen) / 2)
    start = {"value": jnp.zeros(()), "sums": jnp.zeros(2), "counts": jnp.zeros(2)}
    np.testing.assert_allclose(followed(follow_rewards, start, data, 0.3), expected, rtol=1e-9, atol=1e-12)


def test_mean_margin_equals_its_paper(x64):
    # 2407.08639: M <- m M + (1 - m) mean over the batch, m = 0.9.
    mean, expected = 0.0, []
    for pairs in drawn().batches:
        mean = 0.9 * mean + 0.1 * sum(math.log(ratio(w) / ratio(r)) for w, r in pairs) / len(pairs)
        expected.append(mean)
    found = followed(follow_margins, {"value": jnp.zeros(())}, drawn(), 0.3)
    np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-12)
