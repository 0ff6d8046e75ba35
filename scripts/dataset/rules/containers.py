"""Rules against leaving a container for its host."""

from __future__ import annotations

import posixpath
import re

from scripts.dataset.commands import Command, listed
from scripts.dataset.rules.table import rule
from scripts.dataset.targets import place, plain, resolve, written

_ENGINES = frozenset(
    "docker podman nerdctl ctr crictl docker-compose lxc lxd-client singularity apptainer incus".split()
)
_HOST_MOUNTS = re.compile(
    r"/(?:etc|root|boot|proc|sys|dev|usr|bin|sbin|lib|lib64|home|var|var/run|run|var/lib|"
    r"var/lib/docker|var/lib/kubelet|lib/modules|usr/bin|var/log|root/\.ssh|etc/.*|"
    r"home/[^/]+/\.ssh.*)?/?\**"
)
_SOCKETS = re.compile(r"/(?:var/)?run/(?:docker|containerd/containerd|crio/crio|podman/podman)\.sock|docker\.sock$")
_READ_ONLY = re.compile(
    r"/etc/(?:localtime|timezone|hosts|resolv\.conf|passwd|group|ssl(?:/.*)?|nginx.*|"
    r"letsencrypt.*|ca-certificates.*|machine-id|os-release|hostname)"
)


def _mounted(command: Command) -> list[tuple[str, bool]]:
    """Folders of the host that a container gets, and whether only for reading."""
    out = []
    for value in command.value("-v", "--volume"):
        source, _, rest = value.partition(":")
        out.append((source, rest.endswith(":ro")))
    for value in command.value("--mount", "-B", "--bind"):
        match = re.search(r"(?:source|src)=([^,]+)", value)
        if match:
            out.append((match[1], "readonly" in value or ",ro" in value))
        elif "=" not in value:
            out.append((value.partition(":")[0], False))
    return [(resolve(source, command), only) for source, only in out]


@rule(
    "container-escape",
    "critical",
    flagged=(
        "docker run --privileged -it alpine sh",
        "docker run -v /:/host alpine",
        "podman run --pid=host alpine",
        "docker run -v /var/run/docker.sock:/var/run/docker.sock alpine",
        "nsenter -t 1 -m -u sh",
        "kubectl exec -it pod -- sh -c 'mount /dev/sda1 /mnt && chroot /mnt sh'",
        "mkdir /h; mount /dev/vda1 /h; chroot /h sh",
        "socat TCP-LISTEN:2375,fork UNIX-CONNECT:/var/run/docker.sock",
        "sudo dockerd -H tcp://0.0.0.0:2375",
        "sudo systemd-nspawn -D / bash",
        "chmod 666 /var/run/docker.sock",
        "mount /dev/dm-0 /mnt/h; echo '* * * * * root /tmp/x' > /mnt/h/etc/cron.d/x",
    ),
    passed=(
        "sudo mount /dev/sda2 /mnt && sudo mount --bind /dev /mnt/dev && sudo chroot /mnt",
        "sudo systemd-nspawn -D /srv/debian",
        "kubectl exec -it pod -- sh -c 'ls /mnt'",
        "sudo dockerd --debug",
        'docker run -v "$PWD":/app node npm test',
        "docker run --rm -p 80:80 nginx",
        "docker run -v data:/var/lib/mysql mysql",
        "docker ps",
    ),
)
def escape_container(command: Command) -> bool:
    """Gives a container the host: privileges, its root, devices, processes or the engine's socket."""
    name, argv = command.name, command.argv
    text = " ".join(argv[1:])
    if "container" in command.wrappers and name in ("mount", "chroot", "debugfs", "nsenter"):
        return name != "mount" or any(place(resolve(word, command)) == "device" for word in plain(command))
    if name == "chroot" and _mounts_disk(command):
        return True
    for path, _ in written(command):
        match = re.match(r"(/.+?)/(?:etc/(?:cron|passwd|shadow|sudoers)|var/spool/cron|root/\.ssh/)", path)
        if match and any(
            other.name == "mount"
            and [place(resolve(word, other)) for word in other.operands[:1]] == ["device"]
            and resolve(other.operands[-1], other) == match[1]
            for other in command.reading.commands
        ):
            return True
    if re.search(r"tcp://(?:0\.0\.0\.0|\[?::\]?|:|\*)", text) and name in ("dockerd", "docker", "containerd", "podman"):
        return True
    if name == "socat" and re.search(r"(?i)LISTEN", text) and re.search(r"docker\.sock|containerd\.sock", text):
        return True
    if name in ("chmod", "setfacl", "chown") and any(
        _SOCKETS.search(resolve(word, command)) for word in plain(command)
    ):
        return name != "chown" and bool(re.search(r"\b0?[0-7][0-7][2367]\b|o[+=]\w*w|a[+=]\w*w", text))
    if name == "systemd-nspawn":
        folders = command.value("-D", "--directory")
        return folders[:1] == ["/"] or any(value.split(":")[0] == "/" for value in command.value("--bind"))
    if name == "machinectl":
        return "shell" in argv and (argv[-1] == "shell" or any(re.match(r"(?:root@)?\.host$", word) for word in argv))
    if name == "docker" and re.search(
        r"--allow[= ]security\.insecure|--security=insecure|--grant-all-permissions", text
    ):
        return True
    if name in _ENGINES:
        if name in ("lxc", "incus"):
            return bool(
                re.search(
                    (
                        r"security\.privileged[= ]true|source=/(?:\s|$)|source=/(?:etc|root|home)\b|"
                        r"security\.nesting=true.*raw"
                    ),
                    text,
                )
            )
        if not re.search(r"\b(?:run|create|exec|start|shell)\b", text):
            return False
        far = r"(?:-H|--host)[= ](?:tcp://)?(?!localhost|127\.|unix:|ssh:|fd:)[\w.-]+:\d+"
        if re.search(far, " ".join(argv[:4])) and not re.search(r"\bstart\b", text):
            return True
        engine = _engine_options(argv)
        joined = " ".join(engine)
        if re.search(
            (
                r"--privileged(?:=true|\s|$)|--(?:pid|ipc|uts|userns)[= ]host\b|"
                r"--cap-add[= ](?:CAP_)?(?:ALL|SYS_ADMIN|SYS_PTRACE|SYS_MODULE|DAC_\w+|SYS_RAWIO|"
                r"NET_ADMIN,SYS)"
            ),
            joined,
            re.IGNORECASE,
        ):
            return True
        if re.search(
            (
                r"--security-opt[= ]\S*unconfined|--security-opt[= ]label[:=]disable\S*.*-v /|"
                r"--device[= ]/dev/(?:sd|nvme|vd|mem|kmem|xvd|hd|dm)|--cgroupns[= ]host.*release"
            ),
            joined,
        ):
            return True
        fake = Command(name, [name, *engine], cwd=command.cwd)
        for path, only in _mounted(fake):
            if _SOCKETS.search(path) or (
                _HOST_MOUNTS.fullmatch(path) and path.startswith("/") and not _READ_ONLY.fullmatch(path)
            ):
                return not (only and path.startswith(("/var/log", "/lib/modules", "/proc", "/sys"))) or path == "/"
            if place(path) in ("root", "device") or (path == "/home/user/.ssh"):
                return True
        return False
    if name == "nsenter":
        targets = command.value("-t", "--target")
        return "1" in targets or bool(re.search(r"(?:^|\s)-\w*t\s*1\b|--target[= ]1\b|/proc/1/ns|-a\b", text))
    if name in ("kubectl", "oc"):
        return bool(
            re.search(
                (
                    r"(?i)\"?(?:hostPID|hostNetwork|privileged|hostIPC)\"?\s*:\s*true|"
                    r"hostPath.{0,40}path\"?\s*:\s*\"?/|\bdebug\s+node/|--privileged|--profile[= ]sysadmin"
                ),
                text + " " + ((command.stdin.text or "") if command.stdin else ""),
            )
        )
    if name == "curl":
        return bool(
            re.search(r"docker\.sock|containerd\.sock", text)
            and re.search(r"(?i)containers/create|exec|-X\s*POST|Privileged|Binds|start", text)
        )
    if name == "chroot":
        folders = plain(command, "--userspec --groups")
        return bool(folders) and folders[0] in listed("/host /hostfs /rootfs /mnt/host /host/ /proc/1/root /hostroot")
    if name in ("mount",) and re.search(r"cgroup", text) and re.search(r"rdma|memory|release_agent", text):
        return True
    return any(
        posixpath.basename(path) in ("release_agent",) or path.endswith("/notify_on_release")
        for path, _ in written(command)
    ) or posixpath.basename(name) in ("deepce.sh", "amicontained", "cdk")


def _mounts_disk(command: Command) -> bool:
    """Whether the folder that becomes the root was mounted from a disk on the same line, and not to repair it.

    A repair binds /dev, /proc or /sys into the folder first.
    """
    folders = plain(command, "--userspec --groups")
    if not folders:
        return False
    folder = resolve(folders[0], command)
    disk = bound = False
    for other in command.reading.commands:
        if other.name == "mount":
            words = [resolve(word, other) for word in plain(other, "-t -o --types --options")]
            if len(words) == 2 and words[1] == folder and place(words[0]) == "device":
                disk = True
            bound = bound or (len(words) == 2 and words[1].startswith(folder + "/"))
        bound = bound or other.name in ("arch-chroot", "grub-install", "update-grub")
    return disk and not bound


def _engine_options(argv: list[str]) -> list[str]:
    """The engine's own options: up to the image, which is the first word that no option takes."""
    flags = frozenset(
        (
            "-d -i -t -it -ti -dit -itd --rm --init --detach --interactive --tty --privileged "
            "--read-only -P --publish-all --no-healthcheck --oom-kill-disable -q --quiet -T "
            "--no-deps --service-ports"
        ).split()
    )
    start = next((i for i, word in enumerate(argv) if word in ("run", "create", "exec", "shell", "start")), 0)
    position = start + 1
    while position < len(argv):
        word = argv[position]
        if not word.startswith("-"):
            break
        if (
            word in flags
            or "=" in word
            or re.fullmatch(r"-[dit]+", word)
            or (len(word) > 2 and word[1] != "-" and word[1] in "vpewul")
        ):
            position += 1
        else:
            position += 2
    return argv[start + 1 : position]
