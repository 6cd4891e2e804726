"""`mdiff` with a network of a few hundred weights, for whole sweeps in child processes."""

from __future__ import annotations

import sys

import flax.linen as nn

from mdiff import cli, commands, config, job
from mdiff.arguments import option, parse
from mdiff.nets import denoiser, unet
from mdiff.nets.layers import Conv


class Small(nn.Module):
    """Stands in for the U-Net; one convolution, whose gradient is the scan-safe one when asked for."""

    cfg: config.Net

    @nn.compact
    def __call__(self, x, c_noise, cond=None, train=False):
        h = nn.Dense(8, name="a")(x) + nn.Dense(8, name="t")(c_noise[:, None])[:, None, None, :]
        h = Conv(8, scan_safe=self.cfg.scan_safe, name="b")(nn.gelu(h))
        return nn.Dense(x.shape[-1], name="c")(nn.gelu(h))


def install() -> None:
    unet.UNet = Small
    denoiser.unet.UNet = Small


def sweep(arguments):
    path = option(arguments, "config")
    default = config.Config() if path is None else config.load(path)
    args = parse(commands.SweepArgs, arguments, "mdiff sweep", {"fields": default})
    from mdiff.recipes import cells
    from mdiff.recipes import sweep as recipe

    def value(field, words):
        given = parse(commands.SweepValue, [f"--{field}", *words], "mdiff sweep", {"fields": args.fields})
        return cells.get(given.fields, field)

    axes = cells.parse_over(args.over, args.fields, value)
    with job.join("sweep", args.processes, cli._settings(args), notices=True) as this:
        made = this.prepare(
            args.workdir, lambda: recipe.plan(args.fields, axes, args.workdir, args.side_by_side)
        )
        return recipe.run(
            made,
            this.monitor,
            mode=args.side_by_side,
            evaluate=args.eval,
            again_failed=args.again_failed,
            resume=job.resume_line("sweep", arguments),
        )


cli.COMMANDS["sweep"] = cli.Command(sweep, "", "")

if __name__ == "__main__":
    install()
    sys.exit(cli.main())
