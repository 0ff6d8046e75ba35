"""What a command does to what is there: nothing, a change, or a loss."""

import pytest

from scripts.tasks.shell.effects import effect

READS = """
find /var/log -type f -size +50M; ls -la | sort; grep -rn 'rm -rf' src; sed -n '3p' x; sed 's/a/b/' x; cat x 2>/dev/null
tar -tf x.tar; unzip -l x.zip; git log; git stash list; git branch; docker ps -a; kill -l; systemctl status nginx
crontab -l; mount; echo 'rm x'; false # refused: this would do harm; find . -name '*.rm' -exec ls {} +; ss -tlnp
"""
CHANGES = """
sed -i 's/a/b/' x; mv a b; cp a b; ls > out.txt; echo a >> x; tee x < y; chmod 600 x
find . -type f -exec chmod 644 {} +; mkdir -p a/b; touch x
tar -xf x.tar; git commit -m x; git checkout main; sudo systemctl restart nginx; kill 123
docker run -d nginx; pip install x; sort -o x x; truncate -s 0 x; gzip x; find . -name '*.txt' | xargs sed -i 's/a/b/'
"""
DELETES = """
rm x; rm -rf build; find . -name '*.o' -delete; find . -type f -exec rm -f {} +; find . -name x -print0 | xargs -0 rm
sudo rm x; cd x && rm y; shred -u x; rmdir x; git clean -f; git branch -D x; git reset --hard; docker rm x; crontab -r
bash -c 'rm x'; rsync -a --delete a/ b/
"""


@pytest.mark.few(12)
@pytest.mark.parametrize(
    ("text", "expected"),
    [
        *(
            (text.strip(), kind)
            for kind, texts in (("reads", READS), ("changes", CHANGES), ("deletes", DELETES))
            for line in texts.splitlines()
            for text in line.split("; ")
            if text
        ),
        ('ls | while read f; do rm "$f"; done', "deletes"),
        ("ls; rm x", "deletes"),
        ("if then (", None),
        ("", "reads"),
    ],
)
def test_the_worst_that_a_command_does(text, expected):
    assert effect(text) == expected
