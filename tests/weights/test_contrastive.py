import pytest
import torch

from tokenpref.weights import answer_scores, contrastive_log_ratios

LABELS = torch.tensor([[-100, -100, 4, 5], [-100, 6, -100, -100]])
TOKENS = torch.tensor([[1, 2, 4, 5], [1, 6, 0, 0]])


def test_answers_are_cut_out_of_their_columns():
    # column t of the log-probabilities belongs to label t + 1
    logps = torch.tensor([[0.0, -1.0, -2.0], [-3.0, 0.0, 0.0]])
    first, second = answer_scores(logps, LABELS)
    assert first.tolist() == [-1.0, -2.0] and second.tolist() == [-3.0]


def test_sides_with_prompts_of_their_own():
    longer_labels = torch.tensor([[-100, -100, -100, 4, 5], [-100, -100, 6, -100, -100]])
    longer = torch.tensor([[9, 1, 2, 4, 5], [9, 1, 6, 0, 0]])

    def positive(tokens, labels):
        assert tokens.shape[1] == 5
        return torch.tensor([[0.0, 0.0, -1.0, -2.0], [0.0, -3.0, 0.0, 0.0]])

    def negative(tokens, labels):
        return torch.tensor([[0.0, -1.5, -0.5], [-3.25, 0.0, 0.0]])

    ratios = contrastive_log_ratios(positive, negative, (longer, longer_labels), (TOKENS, LABELS))
    assert [r.tolist() for r in ratios] == [[0.5, -1.5], [0.25]]


def test_different_answers_and_bad_scores_are_refused():
    def zeros(tokens, labels):
        return torch.zeros(2, 3)

    other = TOKENS.clone()
    other[0, 3] = 7
    with pytest.raises(ValueError, match="row 0: the two sides score different answers"):
        contrastive_log_ratios(zeros, zeros, (TOKENS, LABELS), (other, LABELS))
    with pytest.raises(ValueError, match="row 1: a log ratio is not finite"):
        contrastive_log_ratios(
            zeros,
            lambda t, labels: torch.tensor([[0.0] * 3, [torch.inf, 0, 0]]),
            (TOKENS, LABELS),
            (TOKENS, LABELS),
        )
