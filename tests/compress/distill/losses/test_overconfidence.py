import torch

from unicomp.compress.distill.losses.overconfidence import confidence_gap


def test_a_hand_made_case() -> None:
    chances = torch.tensor([[[0.9, 0.1], [0.9, 0.1], [0.2, 0.8], [0.6, 0.4]]])
    targets = torch.tensor([[0, 1, 1, 0]])
    counted = torch.tensor([[True, True, True, False]])
    found = confidence_gap(chances.log(), targets, counted)
    torch.testing.assert_close(found, torch.tensor([(0.9 + 0.9 + 0.8) / 3 - 2 / 3]))


def test_a_step_down_makes_a_sure_student_less_sure_and_an_unsure_one_surer() -> None:
    for right, surer in ((0, True), (1, False)):
        logits = torch.tensor([[[1.0, 0.0]] * 4], requires_grad=True)
        confidence_gap(logits, torch.full((1, 4), right), torch.ones(1, 4).bool()).sum().backward()
        assert logits.grad is not None
        moved = torch.softmax(logits.detach() - 0.1 * logits.grad, -1)[..., 0]
        before = torch.softmax(logits.detach(), -1)[..., 0]
        assert ((moved > before) == surer).all()


def test_its_gradient_is_that_of_the_definition() -> None:
    draw = torch.Generator().manual_seed(0)
    start = torch.randn(2, 5, 7, generator=draw, dtype=torch.float64, requires_grad=True)
    targets = torch.randint(7, (2, 5), generator=draw)
    counted = torch.rand(2, 5, generator=draw) < 0.7
    chances = start.exp() / start.exp().sum(-1, keepdim=True)
    total = torch.zeros((), dtype=torch.float64)
    for window in range(2):
        places = [t for t in range(5) if counted[window, t]]
        sure = sum(chances[window, t].max() for t in places)
        right = sum(int(chances[window, t].argmax() == targets[window, t]) for t in places)
        total = total + abs(sure - right) / len(places)
    total.backward()
    single = start.detach().float().requires_grad_()
    value = confidence_gap(single, targets, counted).sum()
    value.backward()
    assert single.grad is not None
    torch.testing.assert_close(value.double(), total)
    torch.testing.assert_close(single.grad.double(), start.grad, rtol=1e-5, atol=1e-6)


def test_a_window_without_positions_gives_nothing() -> None:
    empty = torch.zeros(1, 3).bool()
    assert confidence_gap(torch.randn(1, 3, 4), torch.zeros(1, 3).long(), empty).item() == 0
