"""`osft doctor`: what is installed here, and which kernel would compute what."""

from osft_mcore.log.console import Console
from osft_mcore.log.manifest import hardware, packages
from osft_mcore.model.kernels import installed, kernel_lines, kernels_in_use


def run_doctor(console: Console) -> None:
    """Say it; starts nothing and writes nothing."""
    console.say("packages")
    for name, version in packages().items():
        console.say(f"  {name:<18}  {version}")
    console.say("hardware")
    for name, value in hardware().items():
        console.say(f"  {name:<18}  {value}")
    console.say("kernels")
    for line in kernel_lines(kernels_in_use(installed())):
        console.say(line)
