"""What is asked of images."""

import dataclasses

import tyro


@dataclasses.dataclass(frozen=True, kw_only=True)
class VerifyArgs:
    """Which images, and by which key."""

    uris: tyro.conf.Positional[tuple[str, ...]]
    """Images, or folders or s3:// prefixes of images, searched to any depth."""
    mark_key: str = "public"
    """Key of the invisible mark: public, the file that --mark-key of jobs.translate or mark_key of the endpoint named,
    or none, not to look for it."""
    json: bool = False
    """A line of JSON for each image."""
