"""A bare loop in torch: clients one after another, each in the steps that anybody would write."""

from __future__ import annotations

from work import Work, in_turns


def main() -> None:
    """Train."""
    work = Work.asked_for()
    network = work.network()
    in_turns(work, network, lambda client, round: work.train(network, client, round))


if __name__ == "__main__":
    main()
