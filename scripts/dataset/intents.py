"""What the embedded data knows: intents, each with one canonical command and several ways to ask for it.

``<slot>`` in a phrasing or command stands for one value of :data:`SLOTS`; a digit after the name
(``<file2>``) asks for another value of the same slot. A value written ``shown => typed`` reads differently
in the request and in the command. A phrasing in lower case is an imperative, to which the generator may add
a frame ("How do I ...?"); one that begins with a capital letter is complete, and so is one behind ``~``.

Two rules keep the data learnable: an intent has exactly one command form, and whatever changes the command
is said in the request.
"""

from __future__ import annotations

from typing import NamedTuple


class Intent(NamedTuple):
    """One thing that people ask for.

    Attributes
    ----------
    area
        What it is about: files, text, processes, ...
    name
        Unique name.
    command
        The one Bash command, with slots.
    phrasings
        Ways to ask for it; each names every slot of the command.
    """

    area: str
    name: str
    command: str
    phrasings: tuple[str, ...]


def _words(text: str, between: str | None = None) -> list[str]:
    """The words of a text, or its parts between ``between``."""
    return text.split(between)


def _cross(*parts: str, join: str = "") -> list[str]:
    """Every combination of the words of each part."""
    values = [""]
    for part in parts:
        values = [left + (join if left else "") + right for left in values for right in part.split()]
    return values


_STEMS = (
    "report notes summary users orders invoices config settings data backup results metrics inventory regions "
    "sessions events audit schema index budget contacts schedule export payments products sales access error server app"
)
_FOLDERS = (
    "src docs tests logs assets public scripts reports images templates uploads projects releases exports invoices "
    "configs notes photos datasets archive drafts"
)
_NUMBERS = [str(number) for number in (*range(2, 31), 35, 40, 45, 50, 60, 75, 80, 90, 100, 120, 150, 200, 250, 500)]

SLOTS: dict[str, list[str]] = {
    "file": _cross(_STEMS, ".txt .csv .log .md .json .yaml .conf .xml"),
    "text": _cross(_STEMS, ".txt .log .md .csv"),
    "csv": _cross(_STEMS, ".csv"),
    "json": _cross(_STEMS, ".json"),
    "log": _cross("app error access server worker nginx api auth deploy build cron sync", ".log -debug.log -2024.log"),
    "script": _cross("backup deploy build run cleanup sync install migrate report import export monitor", ".sh")
    + _cross("./bin/ ./tools/ scripts/", "backup.sh deploy.sh build.sh run.sh sync.sh migrate.sh"),
    "runnable": [
        *_cross(
            "./ ./bin/ ./tools/ ./scripts/",
            "backup.sh deploy.sh build.sh run.sh sync.sh migrate.sh import.sh report.py",
        ),
    ],
    "dir": [
        "the current directory => .",
        "my home directory => ~",
        *_FOLDERS.split(),
        *_cross("/srv/ /opt/ /data/ ~/ /var/www/", _FOLDERS),
    ],
    "folder": [*_FOLDERS.split(), *_cross("/srv/ /opt/ /data/ ~/ /var/www/", _FOLDERS)],
    "scratch": [
        *_cross("build dist out target node_modules __pycache__ .cache coverage tmp"),
        *_cross(
            "web/ api/ frontend/ backend/ client/ core/ docs/", "build dist out target node_modules .cache coverage"
        ),
    ],
    "newdir": _cross(_FOLDERS, "/2023 /2024 /2025 /january /march /june /old /new /final /v1 /v2"),
    "kind": [
        "Python files => py",
        "shell scripts => sh",
        "Markdown files => md",
        "log files => log",
        "text files => txt",
        "CSV files => csv",
        "JSON files => json",
        "YAML files => yaml",
        "JavaScript files => js",
        "TypeScript files => ts",
        "HTML files => html",
        "CSS files => css",
        "Java files => java",
        "Go files => go",
        "Rust files => rs",
        "PDF files => pdf",
        "PNG images => png",
        "JPEG images => jpg",
        "XML files => xml",
        "SQL files => sql",
    ],
    "junk": [".tmp => tmp", ".bak => bak", ".pyc => pyc", ".swp => swp", ".o => o", ".orig => orig", ".old => old"],
    "word": _words(
        "error warning timeout failed TODO FIXME redirect connection retry user_id session cache deprecated "
        "exception main import database localhost refused denied success checkout payment WARN FATAL"
    ),
    "newword": _words("info notice ready done pending active beta staging production example updated fixed"),
    "user": _words("alice bob carol dave erin frank grace heidi ivan judy mallory nina oscar peggy deploy www-data"),
    "group": _words("developers staff www-data docker admins editors analysts designers support research"),
    "host": _cross("web1 web2 db1 db2 cache1 mail files build staging gateway", ".example.com .internal .example.org"),
    "domain": _cross("example github python debian kernel wikipedia mozilla gnu apache ubuntu", ".com .org .net"),
    "url": _cross(
        "https://example.com/ https://files.example.org/ https://downloads.example.net/",
        "data.csv backup.tar.gz report.pdf image.iso tool.zip release.tar.xz dump.sql logo.png manual.html index.json",
    ),
    "api": _cross(
        "https://api.example.com/ http://localhost:8080/ https://status.example.org/",
        "users orders health status version items metrics login search products",
    ),
    "port": _words("22 25 53 80 443 3000 3306 5000 5432 6379 8000 8080 8443 8888 9000 9090 9200 27017"),
    "localport": _words("3000 4000 5000 5001 7000 8000 8001 8080 8081 8443 8888 9000 9001 9090"),
    "pid": [str(number) for number in range(1012, 32000, 347)],
    "program": _words(
        "nginx python3 node java postgres redis-server firefox code chrome gunicorn celery mysqld rsync vim"
    ),
    "signal": _words("HUP INT TERM USR1 USR2 STOP CONT"),
    "nice": _words("5 6 7 8 9 10 11 12 13 14 15 16 17 18 19"),
    "number": _NUMBERS,
    "count": [str(number) for number in (*range(2, 13), 15, 20)],
    "lines": [
        f"{first} to {last} => {first},{last}"
        for first in (2, 3, 5, 8, 10, 12, 20, 30)
        for last in (40, 50, 60, 75, 80, 100)
    ],
    "field": _words("1 2 3 4 5 6 7 8 9"),
    "field_name": ["first => 1", "second => 2", "third => 3", "fourth => 4", "fifth => 5", "sixth => 6"],
    "seconds": _words("1 2 3 5 10 15 20 30 45 60 90 120 300 600"),
    "days": _NUMBERS[:36],
    "size": [
        *(f"{number} MB => {number}M" for number in (1, 2, 5, 10, 20, 25, 50, 100, 150, 200, 250, 500, 750)),
        *(f"{number} GB => {number}G" for number in (1, 2, 3, 4, 5, 8, 10)),
        *(f"{number} KB => {number}k" for number in (10, 50, 100, 200, 500)),
    ],
    "mode": _words("600 640 644 660 664 700 750 755 775"),
    "tgz": _cross(
        "backup site project logs photos source release database home docs config website",
        ".tar.gz -2024.tar.gz -old.tar.gz",
    ),
    "txz": _cross("backup site project logs photos source release database docs", ".tar.xz -2024.tar.xz"),
    "zip": _cross("backup site project photos source release docs invoices slides music", ".zip -2024.zip -final.zip"),
    "gz": _cross("access error app dump users events metrics server audit", ".log.gz .csv.gz .txt.gz .sql.gz"),
    "branch": _cross("feature/ fix/ release/", "login search payments api cache upload profile docs checkout reports")
    + _words("develop staging hotfix experiment"),
    "commit": _words("a1b2c3d 9f8e7d6 4c5d6e7 0a9b8c7 e4f5a6b 7d8c9b0 1f2e3d4 b7a6c5d 3e4d5c6 8a7b6c5 d0e1f2a 5b6c7d8"),
    "tag": _cross("v1. v2. v3. v0.", "0.0 0.1 1.0 2.0 4.2 5.1 9.3"),
    "repo": _cross(
        "https://github.com/example/ https://gitlab.com/team/",
        "app.git api.git website.git tools.git docs.git notes.git",
    ),
    "message": _words(
        "fix typo|update readme|add tests|bump version|remove dead code|add login page|clean up imports|"
        "fix crash on start|improve error message|add search endpoint|update dependencies|rename config keys",
        "|",
    ),
    "since": _words(
        "yesterday|1 week ago|2 weeks ago|3 days ago|1 month ago|2 months ago|10 days ago|6 hours ago", "|"
    ),
    "package": _words(
        "nginx git curl vim htop tree jq postgresql redis-server python3-pip build-essential docker.io tmux zsh rsync "
        "ffmpeg imagemagick nodejs openjdk-17-jdk unzip"
    ),
    "rpm": _words("nginx git curl htop tree jq redis tmux zsh rsync unzip gcc make nodejs podman wget nmap httpd"),
    "pip": _words(
        "requests numpy pandas flask django pytest black scipy matplotlib fastapi sqlalchemy rich click pydantic"
    ),
    "version": _words("1.0.0 1.2.3 2.0.1 2.31.0 3.1.4 4.2.0 0.9.5 1.26.4 5.0.2 2.2.1"),
    "npm": _words("express react lodash axios typescript eslint prettier jest webpack vite next vue chalk dotenv"),
    "task": _words("build test lint start dev format deploy preview typecheck clean"),
    "container": _words("web db cache api worker proxy frontend backend scheduler mailer postgres redis"),
    "image": _words(
        "nginx redis postgres:16 python:3.12 node:20 alpine ubuntu:22.04 debian:12 mysql:8 httpd busybox golang:1.22"
    ),
    "imagename": _cross("shop blog api web worker proxy dashboard gateway", ":latest :dev :1.0 :2.1 :test"),
    "namespace": _words("default production staging monitoring kube-system dev ingress payments logging"),
    "pod": _cross("web api worker cache auth billing", "-7d9f -5c8b -x2k4 -0"),
    "deployment": _words("web api worker frontend backend auth billing search gateway notifications"),
    "service": _words(
        "nginx ssh docker postgresql redis cron apache2 mysql memcached NetworkManager bluetooth cups grafana-server "
        "prometheus gunicorn haproxy"
    ),
    "device": _words("/dev/sdb1 /dev/sdc1 /dev/sdd1 /dev/nvme1n1p1 /dev/sdb2 /dev/vdb1 /dev/sde1 /dev/nvme0n1p3"),
    "disk": _words("/dev/sda /dev/sdb /dev/sdc /dev/nvme0n1 /dev/nvme1n1 /dev/vda /dev/vdb /dev/sdd"),
    "mount": _words("/mnt/usb /mnt/data /mnt/backup /media/disk /mnt/photos /mnt/archive /mnt/nas /media/stick"),
    "interface": _words("eth0 eth1 wlan0 enp3s0 wlp2s0 docker0 lo tun0 br0 ens33"),
    "env": _words("PATH HOME EDITOR LANG SHELL DATABASE_URL JAVA_HOME PYTHONPATH TERM NODE_ENV API_URL DEBUG PORT"),
    "key": _words("name id version status email total items price url count title author"),
    "link": _cross("current latest shared active main quick", ".txt -link -data -config"),
    "venv": _words(".venv venv env .env-dev .venv-test py-env sandbox"),
}


_TABLE = """
# files
list_all | ls -la <dir>
  list all files in <dir>, hidden ones included
  show everything in <dir> with details, also hidden files
  list hidden and normal files of <dir> with details
  Which files are in <dir>, including the hidden ones?
  ~ detailed listing of <dir> with dotfiles
list_by_time | ls -lt <dir>
  list the files in <dir> sorted by modification time
  list <dir>, newest files first
  show what is in <dir>, most recently changed first
  Which files in <dir> were changed last?
  sort the listing of <dir> by date
list_by_size | ls -lS <dir>
  list the files in <dir> sorted by size
  list <dir>, largest files first
  show the contents of <dir>, biggest first
  Which are the biggest files directly in <dir>?
  sort the listing of <dir> by file size
list_recursive | ls -R <dir>
  list <dir> recursively
  list <dir> and all its subdirectories
  show the files in <dir> and every folder below it
  ~ recursive listing of <dir>
  show all levels of <dir> with ls
list_directories | find <dir> -maxdepth 1 -type d
  list only the directories in <dir>
  show just the subdirectories of <dir>, one level deep
  find the folders directly inside <dir>
  Which directories are directly in <dir>?
  list folders but no files in <dir>
tree_depth | tree -L <count> <dir>
  show <dir> as a tree, <count> levels deep
  draw a tree of <dir> with depth <count>
  print the directory tree of <dir> down to level <count>
  display the folder structure of <dir>, at most <count> levels
  ~ tree view of <dir>, depth <count>
copy_file | cp <file> <folder>
  copy <file> to <folder>
  copy the file <file> into <folder>
  put a copy of <file> in <folder>
  make a copy of <file> in the folder <folder>
  duplicate <file> into <folder>
copy_directory | cp -r <folder> <folder2>
  copy the directory <folder> to <folder2>
  copy <folder> with everything in it to <folder2>
  recursively copy <folder> into <folder2>
  duplicate the folder <folder> as <folder2>
  make a full copy of the directory <folder> at <folder2>
move_file | mv <file> <folder>
  move <file> to <folder>
  move the file <file> into <folder>
  put <file> into the folder <folder>, without keeping the original
  relocate <file> to <folder>
  shift <file> over to <folder>
rename_file | mv <file> <file2>
  rename <file> to <file2>
  change the name of <file> to <file2>
  give <file> the new name <file2>
  rename the file <file> as <file2>
  call <file> <file2> from now on
backup_file | cp <file> <file>.bak
  make a backup of <file> with the suffix .bak
  back up <file> as a .bak file
  keep a .bak copy of <file>
  save a backup copy of <file> next to it, ending in .bak
  create <file>.bak as a backup
make_directory | mkdir -p <newdir>
  create the directory <newdir> with its parents
  make the folder <newdir>, and parent folders if needed
  create <newdir> including missing parent directories
  make a nested directory <newdir>
  set up the folder path <newdir>
create_file | touch <file>
  create an empty file called <file>
  create the empty file <file>
  make a new, empty file named <file>
  touch <file>
  update the timestamp of <file>, or create it
remove_file | rm <file>
  delete the file <file>
  remove <file>
  delete <file>
  get rid of the file <file>
  erase <file> from this folder
remove_build | rm -r <scratch>
  delete the folder <scratch> and everything in it
  remove the directory <scratch> with its contents
  recursively delete <scratch>
  get rid of the whole <scratch> folder
  wipe the directory <scratch>
make_symlink | ln -s <file> <link>
  create a symbolic link <link> to <file>
  make a symlink called <link> that points to <file>
  link <file> symbolically as <link>
  set up a soft link named <link> for <file>
  symlink <file> to <link>
file_type | file <file>
  show the type of the file <file>
  What kind of file is <file>?
  determine the file type of <file>
  find out what type of data <file> contains
  detect the format of <file>
file_details | stat <file>
  show the metadata of <file>
  print size, permissions and timestamps of <file>
  show the detailed status of <file>
  When was <file> last accessed, modified and changed?
  display inode and timestamps of <file>
absolute_path | realpath <file>
  print the absolute path of <file>
  show the full path of <file>
  What is the absolute path of <file>?
  resolve <file> to its full path
  get the canonical path of <file>
find_by_kind | find <dir> -type f -name '*.<kind>'
  find all <kind> in <dir>
  find <kind> under <dir>
  search <dir> for <kind>
  list every one of the <kind> below <dir>
  Where are the <kind> in <dir>?
find_by_name | find <dir> -name <file>
  find the file <file> in <dir>
  find <file> anywhere below <dir>
  search <dir> for a file called <file>
  locate <file> under <dir>
  Where in <dir> is <file>?
find_word_in_name | find <dir> -iname '*<word>*'
  find files in <dir> whose name contains <word>, in any case
  search <dir> for names containing <word>, ignoring case
  find everything under <dir> with <word> in its name, case-insensitively
  Which names in <dir> contain <word>, upper or lower case?
  look in <dir> for file names with <word> in them, any case
find_larger | find <dir> -type f -size +<size>
  find files larger than <size> in <dir>
  find all files over <size> under <dir>
  search <dir> for files bigger than <size>
  Which files in <dir> are larger than <size>?
  list files in <dir> that exceed <size>
find_recent | find <dir> -type f -mtime -<days>
  find files in <dir> modified in the last <days> days
  find files under <dir> changed within the past <days> days
  Which files in <dir> were modified less than <days> days ago?
  list files in <dir> touched during the last <days> days
  search <dir> for files edited in the last <days> days
find_old | find <dir> -type f -mtime +<days>
  find files in <dir> older than <days> days
  find files under <dir> not modified for more than <days> days
  Which files in <dir> were last modified over <days> days ago?
  list files in <dir> that are more than <days> days old
  search <dir> for files untouched for over <days> days
find_empty_files | find <dir> -type f -empty
  find empty files in <dir>
  list all files of zero size under <dir>
  Which files in <dir> are empty?
  search <dir> for files without content
  find zero-byte files below <dir>
find_empty_directories | find <dir> -type d -empty
  find empty directories in <dir>
  list all empty folders under <dir>
  Which folders in <dir> are empty?
  search <dir> for directories with nothing in them
  find folders without content below <dir>
find_by_owner | find <dir> -user <user>
  find everything in <dir> that belongs to the user <user>
  find files in <dir> owned by <user>
  Which files in <dir> belong to <user>?
  search <dir> for files owned by the user <user>
  list what <user> owns under <dir>
find_newer | find <dir> -newer <file>
  find files in <dir> newer than <file>
  find what changed in <dir> after <file> was modified
  Which files in <dir> are newer than <file>?
  list everything under <dir> modified more recently than <file>
  search <dir> for files newer than <file>
delete_junk | find <folder> -type f -name '*.<junk>' -delete
  delete all <junk> files in <folder>
  remove every <junk> file under <folder>
  clean up <junk> files in <folder>
  find and delete <junk> files below <folder>
  get rid of all files ending in <junk> in <folder>
count_files | find <dir> -type f | wc -l
  count the files in <dir>, subdirectories included
  How many files are in <dir> in total?
  count all files under <dir> recursively
  show the number of files below <dir>
  ~ total number of files in <dir> and its subfolders
compare_files | diff -u <file> <file2>
  show the differences between <file> and <file2> as a unified diff
  compare <file> with <file2> in unified format
  make a unified diff of <file> and <file2>
  diff <file> against <file2>, unified
  What differs between <file> and <file2>? Use unified format
compare_directories | diff -rq <folder> <folder2>
  list the files that differ between the directories <folder> and <folder2>
  compare the folders <folder> and <folder2>, names of differing files only
  Which files differ between <folder> and <folder2>?
  compare <folder> and <folder2> recursively and briefly
  check whether the directories <folder> and <folder2> are the same
sha256 | sha256sum <file>
  compute the SHA-256 checksum of <file>
  print the sha256 hash of <file>
  What is the SHA-256 of <file>?
  calculate the SHA256 sum for <file>
  get the sha256 digest of <file>
sync_directories | rsync -av <folder>/ <folder2>/
  sync <folder> to <folder2> with rsync
  synchronize the contents of <folder> into <folder2>
  mirror <folder> into <folder2> with rsync, keeping attributes
  rsync <folder> into <folder2> in archive mode
  use rsync to copy the contents of <folder> to <folder2>
copy_to_host | scp <file> <user>@<host>:
  copy <file> to the home of <user> on <host>
  upload <file> to <host> as <user> over ssh
  send <file> to <user>@<host> with scp
  transfer <file> to <host> as the user <user>
  scp <file> to <user> at <host>
# text
first_lines | head -n <number> <text>
  show the first <number> lines of <text>
  print the top <number> lines of <text>
  What are the first <number> lines of <text>?
  display the beginning of <text>, <number> lines
  ~ head of <text>, <number> lines
last_lines | tail -n <number> <text>
  show the last <number> lines of <text>
  print the final <number> lines of <text>
  What are the last <number> lines of <text>?
  display the end of <text>, <number> lines
  ~ tail of <text>, <number> lines
follow_log | tail -f <log>
  follow <log> as it grows
  watch <log> live
  keep printing new lines of <log>
  show what is added to <log> in real time
  monitor <log> continuously
number_lines | cat -n <text>
  print <text> with line numbers
  show <text> with numbered lines
  number the lines of <text>
  display <text> and its line numbers
  cat <text> with line numbers
count_lines | wc -l <text>
  count the lines in <text>
  How many lines does <text> have?
  show the number of lines of <text>
  ~ line count of <text>
  get the total number of lines in <text>
count_words | wc -w <text>
  count the words in <text>
  How many words does <text> have?
  show the number of words of <text>
  ~ word count of <text>
  get the total number of words in <text>
search_word | grep '<word>' <text>
  find the lines containing <word> in <text>
  search <text> for <word>
  show lines of <text> that contain <word>
  Which lines of <text> mention <word>?
  grep <word> in <text>
search_ignore_case | grep -i '<word>' <text>
  search <text> for <word>, ignoring case
  find <word> in <text> case-insensitively
  show lines of <text> with <word> in upper or lower case
  grep <word> in <text> regardless of case
  ~ case-insensitive search for <word> in <text>
search_recursive | grep -rn '<word>' <dir>
  search all files in <dir> for <word> with line numbers
  find <word> in every file under <dir>, showing line numbers
  recursively search <dir> for <word> and number the lines
  grep <dir> recursively for <word> with line numbers
  Where does <word> occur in the files of <dir>? Show line numbers
search_file_names | grep -rl '<word>' <dir>
  list the files in <dir> that contain <word>
  Which files under <dir> contain the text <word>?
  show only the names of files in <dir> containing <word>
  find out which files below <dir> mention <word>
  ~ names of the files in <dir> with <word> in their text
search_inverted | grep -v '<word>' <text>
  show the lines of <text> that do not contain <word>
  print <text> without the lines containing <word>
  exclude lines with <word> from <text>
  Which lines of <text> lack <word>?
  hide lines matching <word> in <text>
count_matches | grep -c '<word>' <text>
  count the lines in <text> that contain <word>
  How many lines of <text> contain <word>?
  ~ number of lines in <text> matching <word>
  count how many lines mention <word> in <text>
  get the count of matching lines for <word> in <text>
search_context | grep -C <count> '<word>' <text>
  show lines with <word> in <text> and <count> lines of context
  search <text> for <word> with <count> lines around each match
  find <word> in <text>, <count> lines before and after included
  grep <word> in <text> with <count> lines of context
  print matches of <word> in <text> with <count> surrounding lines
sort_file | sort <text>
  sort the lines of <text> alphabetically
  print <text> in alphabetical order
  sort <text>
  order the lines in <text> from A to Z
  show <text> sorted alphabetically
sort_reverse | sort -r <text>
  sort the lines of <text> in reverse order
  print <text> in reverse alphabetical order
  sort <text> descending
  order the lines in <text> from Z to A
  ~ reverse sort of <text>
sort_numeric | sort -n <text>
  sort <text> numerically
  sort the numbers in <text> from small to large
  order the lines of <text> by numeric value
  print <text> in numerical order
  ~ numeric sort of <text>
sort_unique | sort -u <text>
  sort <text> and remove duplicate lines
  show the unique lines of <text>, sorted
  sort <text> without duplicates
  print each distinct line of <text> once, in order
  drop repeated lines from <text> by sorting
count_duplicates | sort <text> | uniq -c
  count how often each line occurs in <text>
  How many times does each line appear in <text>?
  show every line of <text> with its number of occurrences
  tally the lines of <text>
  ~ frequency of each line in <text>
sort_column | sort -t, -k<field>,<field> <csv>
  sort <csv> by column <field>
  sort the CSV file <csv> on field <field>
  order the rows of <csv> by their column number <field>
  print <csv> sorted by the comma-separated field <field>
  arrange <csv> by column <field>
cut_column | cut -d, -f<field_name> <csv>
  print the <field_name> column of <csv>
  extract the <field_name> comma-separated field of <csv>
  show only the <field_name> column from <csv>
  get the <field_name> column of the CSV file <csv>
  cut the <field_name> field out of <csv>
awk_column | awk '{print $<field>}' <text>
  print word number <field> of each line in <text>
  show the whitespace-separated field <field> of <text>
  extract field <field> from every line of <text> with awk
  print field <field> of <text> using awk
  use awk to get the field <field> of each line in <text>
sum_column | awk -F, '{s += $<field>} END {print s}' <csv>
  add up column <field> of <csv>
  sum the values in column <field> of <csv>
  What is the total of column <field> in <csv>?
  compute the sum of the comma-separated field <field> in <csv>
  ~ total of field <field> of <csv>
replace_print | sed 's/<word>/<newword>/g' <text>
  print <text> with <word> replaced by <newword>
  show <text> with every <word> changed to <newword>
  replace <word> with <newword> in the output of <text>, leaving the file as it is
  output <text> with <newword> instead of <word>
  substitute <newword> for <word> in <text> and print the result
replace_in_place | sed -i 's/<word>/<newword>/g' <text>
  replace <word> with <newword> in the file <text>, in place
  change every <word> to <newword> in <text> and save it
  edit <text> in place, turning <word> into <newword>
  substitute <word> by <newword> directly in <text>
  overwrite <word> with <newword> throughout <text>, saving the file
line_range | sed -n '<lines>p' <text>
  print lines <lines> of <text>
  show the lines <lines> in <text>
  display only lines <lines> of <text>
  extract lines <lines> from <text>
  What is on lines <lines> of <text>?
drop_blank_lines | sed '/^$/d' <text>
  print <text> without blank lines
  remove empty lines from the output of <text>
  show <text> with its empty lines left out
  strip blank lines when printing <text>
  display <text> skipping empty lines
upper_case | tr 'a-z' 'A-Z' < <text>
  print <text> in upper case
  convert the contents of <text> to uppercase
  show <text> in capital letters
  turn all letters of <text> into capitals
  uppercase <text>
lower_case | tr 'A-Z' 'a-z' < <text>
  print <text> in lower case
  convert the contents of <text> to lowercase
  show <text> in small letters
  turn all letters of <text> into small ones
  lowercase <text>
reverse_lines | tac <text>
  print the lines of <text> from last to first
  show <text> backwards, line by line
  reverse the order of the lines in <text>
  display <text> with the last line first
  output <text> upside down
random_lines | shuf -n <number> <text>
  pick <number> random lines from <text>
  show <number> randomly chosen lines of <text>
  sample <number> lines of <text> at random
  draw <number> random lines out of <text>
  get <number> random lines of <text>
align_columns | column -t -s, <csv>
  show <csv> as an aligned table
  print <csv> in neat columns
  format <csv> as a table
  align the columns of <csv>
  display the CSV file <csv> with aligned columns
join_columns | paste -d, <text> <text2>
  join <text> and <text2> line by line with a comma
  paste <text> and <text2> side by side, separated by commas
  merge the lines of <text> and <text2> with commas between
  combine <text> and <text2> into comma-separated columns
  put the lines of <text> and <text2> next to each other with a comma
json_field | jq '.<key>' <json>
  print the field <key> of <json>
  get the value of <key> from <json>
  What is the <key> in <json>?
  extract <key> from the JSON file <json>
  read the key <key> out of <json> with jq
split_file | split -l <number> <text>
  split <text> into pieces of <number> lines
  cut <text> into files of <number> lines each
  break <text> up into parts with <number> lines
  divide <text> every <number> lines
  split <text> after each <number> lines
append_line | echo '<message>' >> <text>
  append the line "<message>" to <text>
  add "<message>" at the end of <text>
  write "<message>" as a new last line of <text>
  add a line saying "<message>" to <text>
  put "<message>" at the bottom of <text>
# processes
processes_of_user | ps -u <user>
  list the processes of the user <user>
  show what <user> is running
  Which processes belong to <user>?
  show running processes owned by <user>
  ~ ps for the user <user>
find_process | pgrep -a <program>
  find the process IDs of <program> with their command lines
  list processes called <program> with pid and command
  Is <program> running? Show its pid and arguments
  show the PIDs and command lines of <program>
  look up running <program> processes with their arguments
send_signal | kill -<signal> <pid>
  send the signal <signal> to process <pid>
  signal process <pid> with <signal>
  send <signal> to the process with PID <pid>
  send SIG<signal> to pid <pid>
  kill process <pid> using the signal <signal>
terminate_process | kill <pid>
  terminate process <pid>
  stop the process with PID <pid>
  end process number <pid> gracefully
  kill the process with the ID <pid>
  ask pid <pid> to exit
terminate_by_name | pkill <program>
  terminate all <program> processes
  stop every process named <program>
  kill all processes called <program>
  end <program> by name
  make all running <program> instances exit
top_memory | ps aux --sort=-%mem | head -n <number>
  show the processes using the most memory, the first <number> lines
  list processes sorted by memory usage, <number> lines
  print <number> lines of processes ordered by memory, highest first
  What uses the most memory? Show <number> lines
  ~ memory hogs, top <number> lines
top_cpu | ps aux --sort=-%cpu | head -n <number>
  show the processes using the most CPU, the first <number> lines
  list processes sorted by CPU usage, <number> lines
  print <number> lines of processes ordered by CPU, highest first
  What uses the most CPU? Show <number> lines
  CPU hogs, top <number> lines
run_in_background | nohup <runnable> > <log> &
  run <runnable> in the background, immune to hangups, with output in <log>
  start <runnable> with nohup in the background, writing to <log>
  keep <runnable> running after logout and log its output to <log>
  launch <runnable> detached and redirect its output to <log>
  nohup <runnable> into <log> in the background
change_priority | renice -n <nice> -p <pid>
  set the niceness of process <pid> to <nice>
  change the priority of pid <pid> to nice <nice>
  renice process <pid> to <nice>
  give process <pid> the nice value <nice>
  lower the priority of PID <pid> to <nice>
open_files | lsof -p <pid>
  list the files opened by process <pid>
  Which files does process <pid> have open?
  show open files of PID <pid>
  ~ what has pid <pid> opened
  see every open file of the process <pid>
who_uses_file | lsof <file>
  show which processes have <file> open
  Who is using the file <file>?
  find the process that keeps <file> open
  Which program has <file> open?
  list processes accessing <file>
run_with_timeout | timeout <seconds> <runnable>
  run <runnable> for at most <seconds> seconds
  run <runnable> and stop it after <seconds> seconds
  limit <runnable> to <seconds> seconds
  start <runnable> with a timeout of <seconds> seconds
  abort <runnable> if it takes longer than <seconds> seconds
watch_directory | watch -n <seconds> ls -l <dir>
  list <dir> again every <seconds> seconds
  watch the contents of <dir>, refreshing every <seconds> seconds
  show the files in <dir> and update every <seconds> seconds
  repeat ls -l on <dir> each <seconds> seconds
  monitor the listing of <dir> at an interval of <seconds> seconds
process_tree | pstree -p <pid>
  show the process tree of <pid> with PIDs
  display the children of process <pid> as a tree with their PIDs
  draw the tree of processes below <pid>, PIDs included
  Which processes descend from <pid>? Show a tree with PIDs
  ~ tree of child processes for PID <pid>
print_variable | printenv <env>
  print the environment variable <env>
  show the value of <env>
  What is <env> set to?
  display the variable <env>
  get the value of the environment variable <env>
# network
ping_host | ping -c <count> <host>
  ping <host> <count> times
  send <count> pings to <host>
  check whether <host> answers, with <count> packets
  test the connection to <host> using <count> pings
  Is <host> reachable? Try <count> packets
http_headers | curl -I <api>
  show the HTTP headers of <api>
  fetch only the response headers from <api>
  Which headers does <api> return?
  make a HEAD request to <api>
  get the header information of <api>
http_status | curl -s -o /dev/null -w '%{http_code}' <api>
  print only the HTTP status code of <api>
  What status code does <api> return?
  check the response code of <api>
  get just the HTTP code for <api>
  show the status code that <api> answers with
download_keep_name | curl -O <url>
  download <url> with curl and keep its name
  fetch <url> with curl under its remote name
  save <url> under the same name using curl
  curl <url> to a file of the same name
  use curl to download <url>, same file name
download_as | curl -o <file> <url>
  download <url> and save it as <file>
  fetch <url> into the file <file>
  save <url> under the name <file>
  get <url> and store it as <file>
  download <url> to <file>
resume_download | wget -c <url>
  resume the download of <url>
  continue downloading <url> with wget
  download <url>, picking up where it stopped
  finish the interrupted download of <url>
  wget <url>, continuing a partial file
post_json | curl -X POST -d @<json> <api>
  send <json> to <api> with a POST request
  post the contents of <json> to <api>
  make a POST request to <api> with the body from <json>
  submit <json> to <api> by POST
  POST <json> to <api>
lookup_address | dig +short <domain>
  look up the IP address of <domain>
  What is the IP address of <domain>?
  resolve <domain> and print only the address
  show just the IP of <domain>
  ~ short DNS lookup for <domain>
lookup_mail | dig +short MX <domain>
  look up the mail servers of <domain>
  Which mail servers does <domain> use?
  show the MX records of <domain>
  get the MX records for <domain>, short
  find the mail exchangers of <domain>
whois_domain | whois <domain>
  show the registration details of <domain>
  Who owns the domain <domain>?
  look up the whois record of <domain>
  find out who registered <domain>
  get the registrar of <domain>
port_user | lsof -i :<port>
  show which process uses port <port>
  What is running on port <port>?
  find the program listening on port <port>
  Who occupies port <port>?
  list the processes on port <port>
check_port | nc -zv <host> <port>
  check whether port <port> on <host> is open
  Is port <port> open on <host>?
  test if <host> accepts connections on port <port>
  probe port <port> of <host>
  see if <host> listens on port <port>
trace_route | traceroute <host>
  trace the route to <host>
  show the hops on the way to <host>
  Which path do packets take to <host>?
  list every router between here and <host>
  follow the network path to <host>
interface_address | ip addr show <interface>
  show the IP address of <interface>
  What is the address of the interface <interface>?
  display the addresses assigned to <interface>
  list IP addresses on the network interface <interface>
  get the IP configuration of <interface>
ssh_port | ssh -p <port> <user>@<host>
  log in to <host> as <user> over ssh on port <port>
  connect by ssh to <host> as <user>, port <port>
  open an ssh session to <user>@<host> on port <port>
  ssh into <host> with the user <user> through port <port>
  start a secure shell to <host> as <user> using port <port>
ssh_tunnel | ssh -L <localport>:localhost:<port> <host>
  forward local port <localport> to port <port> on <host> over ssh
  open an ssh tunnel from local port <localport> to port <port> of <host>
  tunnel port <port> of <host> to my port <localport>
  make port <port> on <host> reachable at local port <localport> with ssh
  set up ssh port forwarding, local <localport> to <port> at <host>
serve_directory | python3 -m http.server <localport> -d <folder>
  serve <folder> over HTTP on port <localport>
  start a simple web server for <folder> on port <localport>
  share the folder <folder> by HTTP at port <localport>
  run Python's web server in <folder> on port <localport>
  host the files of <folder> on port <localport> with Python
# archives
tar_create | tar -czf <tgz> <folder>
  create the archive <tgz> from <folder>
  compress <folder> into <tgz>
  pack the directory <folder> as <tgz>
  make a gzipped tarball <tgz> of <folder>
  archive <folder> in <tgz>
tar_extract | tar -xzf <tgz>
  extract <tgz>
  unpack the archive <tgz>
  untar <tgz> here
  decompress the tarball <tgz>
  get the files out of <tgz>
tar_extract_to | tar -xzf <tgz> -C <folder>
  extract <tgz> into <folder>
  unpack the archive <tgz> to the directory <folder>
  untar <tgz> in <folder>
  decompress <tgz> into the folder <folder>
  put the contents of <tgz> into <folder>
tar_list | tar -tzf <tgz>
  list the contents of <tgz>
  What is inside the archive <tgz>?
  show the files in <tgz> without extracting
  see what <tgz> contains
  print the table of contents of <tgz>
tar_create_xz | tar -cJf <txz> <folder>
  create the xz archive <txz> from <folder>
  compress <folder> with xz into <txz>
  pack <folder> as the xz tarball <txz>
  make <txz> out of <folder> with xz compression
  archive <folder> in <txz> using xz
zip_create | zip -r <zip> <folder>
  zip <folder> into <zip>
  create the zip file <zip> from the directory <folder>
  compress <folder> as <zip>
  make a zip archive <zip> of <folder>
  pack the folder <folder> into <zip>
zip_extract | unzip <zip> -d <folder>
  unzip <zip> into <folder>
  extract the zip file <zip> to <folder>
  unpack <zip> in the directory <folder>
  put the contents of the zip <zip> into <folder>
  decompress <zip> to <folder>
zip_list | unzip -l <zip>
  list the contents of <zip>
  What is inside the zip file <zip>?
  show the files in <zip> without unpacking
  see what the zip archive <zip> contains
  print the names of the files in <zip>
gzip_keep | gzip -k <file>
  compress <file> with gzip and keep the original
  gzip <file> without deleting it
  make a gzipped copy of <file>
  compress <file> using gzip, leaving the file in place
  create <file>.gz and keep <file>
gunzip_file | gunzip <gz>
  decompress <gz>
  uncompress the file <gz>
  gunzip <gz>
  expand the gzip file <gz>
  unpack <gz>
view_gzip | zcat <gz>
  print the contents of <gz> without unpacking it
  show the compressed file <gz>
  read <gz> without decompressing it on disk
  display the text inside <gz>
  view <gz> without extracting
search_gzip | zgrep '<word>' <gz>
  search the compressed file <gz> for <word>
  find <word> in <gz> without unpacking
  grep <word> in the gzipped file <gz>
  Which lines in <gz> contain <word>?
  look for <word> inside <gz>
# permissions
make_executable | chmod +x <script>
  make <script> executable
  allow <script> to be executed
  give <script> execute permission
  mark <script> as executable
  set the executable bit on <script>
set_mode | chmod <mode> <file>
  set the permissions of <file> to <mode>
  change the mode of <file> to <mode>
  chmod <file> to <mode>
  give <file> the permissions <mode>
  apply mode <mode> to <file>
no_group_write | chmod go-w <file>
  remove write permission on <file> for group and others
  take away write access to <file> from everyone but the owner
  stop group and others from writing to <file>
  make <file> writable by its owner only, leaving the rest
  revoke group and other write rights on <file>
change_owner | sudo chown <user> <file>
  make <user> the owner of <file>
  change the owner of <file> to <user>
  give the ownership of <file> to <user>
  transfer <file> to the owner <user>
  set <user> as owner of <file>
change_owner_recursive | sudo chown -R <user>:<group> <folder>
  give <folder> and all its contents to the user <user> and group <group>
  change owner and group of <folder> to <user> and <group>, recursively
  recursively set the owner <user> and the group <group> on <folder>
  make <user>:<group> own everything in <folder>
  assign <folder> with all files to <user> in the group <group>
change_group | chgrp <group> <file>
  change the group of <file> to <group>
  set the group <group> on <file>
  give <file> to the group <group>
  make <group> the group of <file>
  assign <file> to the group <group>
show_mode | stat -c '%a' <file>
  print the octal permissions of <file>
  What are the permissions of <file> in octal?
  show the numeric mode of <file>
  get the permission bits of <file> as a number
  ~ octal mode of <file>
find_by_mode | find <dir> -type f -perm <mode>
  find files in <dir> with permissions <mode>
  Which files in <dir> have mode <mode>?
  search <dir> for files whose mode is exactly <mode>
  list files under <dir> that have the permissions <mode>
  find all files below <dir> with mode <mode>
user_groups | groups <user>
  show the groups of the user <user>
  Which groups is <user> in?
  list the groups that <user> belongs to
  print the group memberships of <user>
  What groups does <user> belong to?
user_ids | id <user>
  show the user and group IDs of <user>
  What is the uid of <user>?
  print the numeric IDs of the user <user>
  get uid and gid of <user>
  look up the user ID of <user>
# disks
free_space | df -h <folder>
  show the free space on the file system of <folder>
  How much disk space is left where <folder> lies?
  check the available disk space for <folder>
  show disk usage of the file system holding <folder>, human-readable
  ~ free disk space at <folder>
free_inodes | df -i <folder>
  show the free inodes on the file system of <folder>
  How many inodes are left where <folder> lies?
  check inode usage for <folder>
  display used and free inodes of the file system holding <folder>
  ~ inode usage at <folder>
directory_size | du -sh <dir>
  show the total size of <dir>
  How big is <dir>?
  How much space does <dir> take?
  get the size of <dir> in human-readable form
  ~ disk usage of <dir>, total only
subdirectory_sizes | du -h --max-depth=<count> <dir>
  show the sizes of the directories in <dir> down to depth <count>
  ~ disk usage of <dir>, <count> levels deep
  show how much space the folders in <dir> take, to depth <count>
  print directory sizes under <dir> with a maximum depth of <count>
  How big are the folders in <dir>, up to level <count>?
largest_entries | du -ah <dir> | sort -rh | head -n <number>
  show the <number> largest files and folders in <dir>
  find the <number> biggest things under <dir>
  What are the <number> largest entries below <dir>?
  list the top <number> space users in <dir>
  ~ <number> biggest files or directories of <dir>
list_partitions | lsblk <disk>
  list the partitions of <disk>
  Which partitions are on <disk>?
  show the block devices on <disk>
  display how <disk> is partitioned
  ~ partition overview of <disk>
device_uuid | sudo blkid <device>
  show the UUID and file system type of <device>
  What is the UUID of <device>?
  print the file system UUID of <device>
  get the identifier of the partition <device>
  find the UUID for <device>
mount_device | sudo mount <device> <mount>
  mount <device> on <mount>
  mount the partition <device> at <mount>
  attach <device> to the directory <mount>
  make <device> available under <mount>
  connect the file system on <device> at <mount>
unmount | sudo umount <mount>
  unmount <mount>
  detach the file system at <mount>
  unmount the drive mounted at <mount>
  safely disconnect what is mounted on <mount>
  release the mount point <mount>
reserve_file | fallocate -l <size> <file>
  create the file <file> with a size of <size>
  allocate <size> for the file <file>
  reserve <size> of disk space in <file>
  make a file named <file> that is <size> large
  preallocate <file> with <size>
# git
git_clone | git clone <repo> <folder>
  clone <repo> into <folder>
  clone the repository <repo> to the folder <folder>
  get a copy of the git repository <repo> in <folder>
  check out <repo> freshly into <folder>
  ~ git clone <repo>, directory <folder>
git_new_branch | git switch -c <branch>
  create a new branch <branch> and switch to it
  start the branch <branch>
  make a branch called <branch> and check it out
  open a new git branch named <branch>
  branch off to <branch>
git_switch | git switch <branch>
  switch to the branch <branch>
  check out the existing branch <branch>
  change to branch <branch>
  go to the git branch <branch>
  move over to the branch <branch>
git_merge | git merge <branch>
  merge the branch <branch> into the current one
  bring <branch> into my branch by merging
  merge <branch>
  integrate the changes of <branch> with a merge
  combine <branch> with the current branch
git_delete_branch | git branch -d <branch>
  delete the local branch <branch>
  remove the merged branch <branch>
  drop the git branch <branch>
  get rid of the local branch <branch>
  clean up the branch <branch> after merging
git_log_count | git log --oneline -n <number>
  show the last <number> commits, one line each
  list the <number> latest commits in short form
  What were the last <number> commits? One line each
  print a one-line log of <number> commits
  ~ compact history of the last <number> commits
git_log_author | git log --author=<user>
  show the commits by <user>
  Which commits did <user> make?
  list the git history of the author <user>
  filter the log by author <user>
  see what <user> committed
git_log_since | git log --since='<since>'
  show the commits since <since>
  list commits made since <since>
  What was committed since <since>?
  print the git log starting from <since>
  ~ history of commits since <since>
git_log_file | git log --follow <file>
  show the history of the file <file>, across renames
  list the commits that changed <file>, following renames
  How did <file> change over time, renames included?
  follow the git history of <file>
  ~ commits touching <file>, even under older names
git_diff_branch | git diff <branch>
  compare the working tree with the branch <branch>
  show the differences to the branch <branch>
  diff against <branch>
  What differs from the branch <branch>?
  see how my files differ from <branch>
git_blame | git blame <file>
  show who last changed each line of <file>
  Who wrote which line of <file>?
  annotate <file> with authors and commits
  find out who edited each line in <file>
  blame <file>
git_add | git add <file>
  stage <file>
  add <file> to the next commit
  stage the changes in <file>
  put <file> into the git index
  mark <file> for committing
git_unstage | git restore --staged <file>
  unstage <file>
  take <file> out of the next commit, keeping its changes
  remove <file> from the staging area
  undo git add for <file>
  restore the index entry of <file>
git_discard | git restore <file>
  discard my changes in <file>
  throw away uncommitted edits to <file>
  revert <file> to its last committed state
  undo local modifications of <file>
  drop the unstaged changes of <file>
git_commit | git commit -m '<message>'
  commit the staged changes with the message "<message>"
  make a commit saying "<message>"
  commit with message "<message>"
  record the staged files as "<message>"
  create a git commit named "<message>"
git_push | git push origin <branch>
  push the branch <branch> to origin
  upload <branch> to the remote origin
  publish my commits on <branch> to origin
  send the branch <branch> to the remote
  push <branch>
git_pull | git pull origin <branch>
  pull the branch <branch> from origin
  fetch and merge <branch> from origin
  get the latest changes of <branch> from the remote
  update from <branch> on origin
  pull <branch>
git_tag | git tag -a <tag> -m '<message>'
  create the annotated tag <tag> with the message "<message>"
  tag this commit as <tag> with the note "<message>"
  make a git tag <tag> saying "<message>"
  mark the current commit as <tag>, message "<message>"
  add the annotated tag <tag>, described as "<message>"
git_revert | git revert <commit>
  revert the commit <commit>
  undo commit <commit> with a new commit
  make a commit that reverses <commit>
  back out the changes of <commit>
  create an inverse commit for <commit>
git_cherry_pick | git cherry-pick <commit>
  apply the commit <commit> to the current branch
  cherry-pick <commit>
  take over the single commit <commit>
  copy commit <commit> onto this branch
  bring just <commit> into my branch
git_undo_commits | git reset --soft HEAD~<count>
  undo the last <count> commits but keep the changes staged
  ~ soft reset by <count> commits
  go back <count> commits and keep my changes in the index
  take back <count> commits without losing work
  uncommit the last <count> commits, leaving files staged
git_show_file | git show <commit>:<file>
  show <file> as it was in commit <commit>
  print the version of <file> from commit <commit>
  What did <file> look like at <commit>?
  display <file> at the commit <commit>
  view the old <file> from <commit>
# packages
apt_install | sudo apt install <package>
  install the package <package> with apt
  install <package> using apt
  ~ apt: install <package>
  get <package> from the apt repositories
  set up <package> on Debian with apt
apt_remove | sudo apt remove <package>
  remove the package <package> with apt
  uninstall <package> using apt
  ~ apt: remove <package>
  take <package> off this Debian system
  get rid of the apt package <package>
apt_show | apt show <package>
  show details about the apt package <package>
  What is the apt package <package>?
  print the description of <package> with apt
  display version and dependencies of the apt package <package>
  ~ apt information on <package>
apt_search | apt search <package>
  search the apt repositories for <package>
  look for <package> with apt
  find apt packages matching <package>
  Which apt packages match <package>?
  ~ apt search for the term <package>
package_files | dpkg -L <package>
  list the files that the package <package> installed
  Which files belong to the package <package>?
  show the contents of the installed package <package>
  ~ where did the package <package> put its files
  ~ files of the Debian package <package>
dnf_install | sudo dnf install <rpm>
  install the package <rpm> with dnf
  install <rpm> using dnf
  ~ dnf: install <rpm>
  get <rpm> from the Fedora repositories
  set up <rpm> on Fedora
pip_install | pip install <pip>==<version>
  install version <version> of the Python package <pip>
  ~ pip install <pip>, version <version>
  install <pip> <version> with pip
  get exactly <pip> <version> for Python
  pin <pip> to <version> and install it with pip
pip_upgrade | pip install --upgrade <pip>
  upgrade the Python package <pip>
  update <pip> to the latest version with pip
  bring <pip> up to date with pip
  get the newest release of the Python package <pip>
  ~ pip upgrade for <pip>
pip_show | pip show <pip>
  show details about the Python package <pip>
  Which version of the Python package <pip> is installed?
  print information on <pip> with pip
  ~ where is the Python package <pip> installed
  ~ pip details of <pip>
make_venv | python3 -m venv <venv>
  create a Python virtual environment in <venv>
  make a virtualenv called <venv>
  set up a new venv named <venv>
  create the virtual environment <venv> with python3
  ~ new Python environment in the folder <venv>
npm_install | npm install <npm>
  install the npm package <npm>
  add <npm> to my Node project
  ~ npm: install <npm>
  install <npm> for this project with npm
  get the Node package <npm>
npm_install_dev | npm install --save-dev <npm>
  install <npm> as a development dependency
  add the npm package <npm> for development only
  ~ npm: install <npm> to devDependencies
  save <npm> as a dev dependency with npm
  put <npm> into devDependencies
npm_run | npm run <task>
  run the npm script <task>
  execute the <task> script of package.json
  start the npm task <task>
  ~ npm: run <task>
  launch the script called <task> with npm
# containers
docker_run_detached | docker run -d --name <container> -p <localport>:<port> <image>
  run <image> in the background as <container>, host port <localport> to container port <port>
  start a detached container <container> from <image> with port <localport> mapped to <port>
  launch <image> as the container <container> in the background, publishing <port> on <localport>
  ~ docker: run <image> detached, named <container>, ports <localport> to <port>
  start <image> under the name <container> in the background and map port <localport> to <port>
docker_run_shell | docker run -it --rm <image> sh
  open a shell in a temporary container of <image>
  start an interactive sh in <image> and remove the container afterwards
  try out the image <image> with a throw-away shell
  run sh interactively in a disposable <image> container
  get a shell in a fresh <image> container that is deleted on exit
docker_logs | docker logs --tail <number> <container>
  show the last <number> log lines of the container <container>
  print <number> recent log lines of the docker container <container>
  What did the container <container> log last? <number> lines
  tail the docker logs of <container>, <number> lines
  ~ docker: last <number> lines logged by <container>
docker_logs_follow | docker logs -f <container>
  follow the logs of the container <container>
  watch the docker logs of <container> live
  stream the log output of the container <container>
  keep showing new log lines from the container <container>
  ~ docker: follow the logs of <container>
docker_exec | docker exec -it <container> bash
  open a bash shell in the container <container>
  get into the running container <container> with bash
  start bash inside the docker container <container>
  attach an interactive bash to the container <container>
  ~ docker: shell into <container>
docker_stop | docker stop <container>
  stop the container <container>
  shut down the docker container <container>
  halt the running container <container>
  ~ docker: stop <container>
  bring the container <container> to a stop
docker_restart | docker restart <container>
  restart the container <container>
  stop and start the docker container <container> again
  ~ docker: restart <container>
  reboot the container <container>
  give the container <container> a restart
docker_remove | docker rm <container>
  remove the stopped container <container>
  delete the docker container <container>
  ~ docker: remove the container <container>
  get rid of the container <container>
  discard the stopped container <container>
docker_pull | docker pull <image>
  download the image <image>
  pull the docker image <image>
  fetch <image> from the registry
  ~ docker: get the image <image>
  update my local copy of the image <image>
docker_build | docker build -t <imagename> <folder>
  build the image <imagename> from <folder>
  build a docker image tagged <imagename> out of <folder>
  make the image <imagename> with the Dockerfile in <folder>
  ~ docker: build <folder> as <imagename>
  create <imagename> by building the directory <folder>
docker_copy | docker cp <container>:<file> <folder>
  copy <file> out of the container <container> into <folder>
  get <file> from the docker container <container> to <folder>
  fetch the file <file> from container <container> and put it in <folder>
  ~ docker: copy <file> of <container> to the host folder <folder>
  extract <file> from the container <container> to <folder>
compose_up | docker compose up -d <container>
  start the compose service <container> in the background
  bring up <container> with docker compose, detached
  ~ docker compose: start <container> detached
  launch the service <container> of the compose file in the background
  run the compose service <container> detached
kubectl_pods | kubectl get pods -n <namespace>
  list the pods in the namespace <namespace>
  show all Kubernetes pods of <namespace>
  Which pods run in the namespace <namespace>?
  get the pods of namespace <namespace>
  ~ kubectl: pods in <namespace>
kubectl_logs | kubectl logs <pod> -n <namespace>
  show the logs of the pod <pod> in the namespace <namespace>
  print what pod <pod> logged, namespace <namespace>
  get the log of the Kubernetes pod <pod> in <namespace>
  ~ kubectl: logs of <pod> in <namespace>
  read the output of pod <pod> from the namespace <namespace>
kubectl_describe | kubectl describe pod <pod> -n <namespace>
  describe the pod <pod> in the namespace <namespace>
  show the details and events of pod <pod> in <namespace>
  Why is the pod <pod> in <namespace> not ready? Show its details
  ~ kubectl: describe pod <pod>, namespace <namespace>
  print the full description of the pod <pod> in <namespace>
kubectl_scale | kubectl scale deployment <deployment> --replicas=<count>
  scale the deployment <deployment> to <count> replicas
  run <count> replicas of the deployment <deployment>
  set the number of replicas of <deployment> to <count>
  change the deployment <deployment> to <count> pods
  ~ kubectl: <count> replicas for the deployment <deployment>
# systemd
service_status | systemctl status <service>
  show the status of the service <service>
  Is the <service> service running? Show its status
  check how the <service> service is doing
  get the systemd status of <service>
  What state is the service <service> in?
service_start | sudo systemctl start <service>
  start the service <service>
  start <service> with systemd
  bring up the <service> service
  launch the systemd service <service>
  get the <service> service running now
service_stop | sudo systemctl stop <service>
  stop the service <service>
  stop <service> with systemd
  shut down the <service> service
  halt the systemd service <service>
  bring the <service> service down
service_restart | sudo systemctl restart <service>
  restart the service <service>
  restart <service> with systemd
  stop the <service> service and start it again
  bounce the <service> service
  give the systemd service <service> a restart
service_reload | sudo systemctl reload <service>
  reload the configuration of the service <service>
  make the <service> service reread its configuration
  reload <service> without restarting it
  let systemd reload <service>
  apply new settings to the running <service> service by reloading it
service_enable | sudo systemctl enable <service>
  start the service <service> automatically at boot
  enable the <service> service
  make <service> start on every boot
  have systemd launch <service> at startup
  turn on autostart for the <service> service
service_disable | sudo systemctl disable <service>
  ~ don't start the service <service> at boot any more
  disable the <service> service
  keep <service> from starting on boot
  stop systemd from launching <service> at startup
  turn off autostart for the <service> service
journal_unit | journalctl -u <service> -n <number>
  show the last <number> journal lines of the service <service>
  print <number> recent log entries of the <service> service
  What did the service <service> log last? <number> lines
  read the newest <number> journal entries for <service>
  ~ journal of <service>, last <number> lines
journal_since | journalctl -u <service> --since '<since>'
  show the journal of the service <service> since <since>
  print the logs of the <service> service since <since>
  What did the service <service> log since <since>?
  read the systemd journal for <service> from <since> on
  ~ journal entries of <service> since <since>
journal_follow | journalctl -u <service> -f
  follow the journal of the service <service>
  watch the systemd logs of <service> live
  stream new journal entries of the <service> service
  keep printing what the service <service> logs
  tail the journal of <service> continuously
"""


def _parse(table: str) -> tuple[Intent, ...]:
    """Read :data:`_TABLE`: ``# area``, then ``name | command`` with its phrasings indented below."""
    intents: list[Intent] = []
    area = ""
    for line in table.strip().splitlines():
        if line.startswith("# "):
            area = line[2:]
        elif line.startswith("  "):
            last = intents[-1]
            intents[-1] = last._replace(phrasings=(*last.phrasings, line.strip()))
        else:
            name, command = line.split(" | ", 1)
            intents.append(Intent(area, name, command, ()))
    return tuple(intents)


INTENTS = _parse(_TABLE)
