"""The hub, asked once: huggingface_hub tries for minutes, file by file, and a request of ours decides whether it is asked at all."""

__all__ = ["unreachable"]


def unreachable() -> str | None:
    """Return why the hub cannot be asked, or ``None`` if it answers; without a request where ``HF_HUB_OFFLINE`` is set."""
    from huggingface_hub import constants, get_session

    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set"
    try:
        answer = get_session().head(constants.ENDPOINT, timeout=5.0)
    # of whichever library it goes through, and of its proxies
    except Exception as e:
        return f"{constants.ENDPOINT} does not answer ({type(e).__name__}: {(str(e).strip() or 'no reason').splitlines()[0]})"
    # of a gateway in front of it; what else it says is for the request that has a question
    return f"{constants.ENDPOINT} answers {answer.status_code}" if answer.status_code in (502, 503, 504) else None
