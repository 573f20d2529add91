"""Two folders of images, no pairs, to a translator: every stage in one command.

    python -m jobs.recipe --source FOLDER --output URI
    python -m jobs.translate --checkpoint URI --input photo.jpg --domain SIDE --output DIR

FOLDER has a sub-folder of images for each side. URI is a --checkpoint from the first network on, and a better one after
the second. The same command again goes on where it was.
"""

from collections.abc import Sequence

from jobs.common import cli


def main(argv: Sequence[str] | None = None) -> int:
    from jobs.suite.options import RecipeArgs

    args = cli.parse(RecipeArgs, argv, prog="jobs.recipe", description=__doc__)
    from jobs.suite import recipe

    return recipe.run(args)


if __name__ == "__main__":
    cli.run(main)
