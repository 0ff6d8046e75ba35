"""One table says what went wrong with the Hub, for models and datasets; where nothing else fits, the error speaks."""

import pytest

from dryfit.common.hub_errors import Failure, meaning


class GatedRepoError(Exception):
    """By its name alone: huggingface_hub need not be there."""


@pytest.mark.parametrize(
    ("failure", "said", "todo"),
    [
        (
            Failure({"GatedRepoError"}, 403),
            "The dataset is gated",
            "https://huggingface.co/datasets/owner/name",
        ),
        (
            Failure({"RepositoryNotFoundError"}, 404),
            "no such dataset, or it is private",
            "nearest: owner/named",
        ),
        (Failure({"HTTPError", "OSError"}, 500), "an error (500)", "another try, later; or a copy"),
        (
            Failure({"ReadTimeout", "TransportError"}, None),
            "does not answer in time",
            "HF_HUB_ETAG_TIMEOUT",
        ),
        (
            Failure({"ConnectionError", "OSError"}, None),
            "can't be reached",
            "HF_ENDPOINT; or a copy",
        ),
        (
            Failure({"ValueError"}, None, "no split"),
            "The dataset can't be had: no split",
            "; or a copy",
        ),
    ],
)
def test_each_failure_says_what_to_do(failure: Failure, said: str, todo: str) -> None:
    problem, allowed = meaning(
        failure, "dataset", "owner/name", instead="a copy", nearest="owner/named"
    )
    assert said in problem and todo in allowed


def test_what_led_to_an_error_is_looked_at_and_its_secrets_are_not_shown() -> None:
    try:
        try:
            raise GatedRepoError("first")
        except GatedRepoError as error:
            raise ValueError(
                "token hf_abcdefghijklmnopqrstuvwxyz012345 was sent\nsecond line"
            ) from error
    except ValueError as error:
        failure = Failure.of(error)
    assert "GatedRepoError" in failure.names and failure.status is None
    assert "hf_abc" not in failure.message and "second" not in failure.message
