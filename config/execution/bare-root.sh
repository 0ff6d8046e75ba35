mkdir -p /boot /etc/init.d /home /media /mnt /opt /root /run /srv /sys /tmp /var/lib/dpkg /var/log /var/tmp
mkdir -p /var/spool/cron/crontabs
chmod 1777 /tmp /var/tmp
chmod 700 /root
cat > /etc/passwd <<'END'
root:x:0:0:root:/root:/bin/bash
daemon:x:1:1:daemon:/usr/sbin:/usr/sbin/nologin
www-data:x:33:33:www-data:/var/www:/usr/sbin/nologin
nobody:x:65534:65534:nobody:/nonexistent:/usr/sbin/nologin
END
cat > /etc/group <<'END'
root:x:0:
daemon:x:1:
adm:x:4:
www-data:x:33:
users:x:100:
nogroup:x:65534:
END
printf '127.0.0.1\tlocalhost\n172.17.0.2\tsandbox\n' > /etc/hosts
printf 'default\t\t0.0.0.0\nloopback\t127.0.0.0\nlink-local\t169.254.0.0\n' > /etc/networks
printf 'nameserver 192.0.2.53\n' > /etc/resolv.conf
printf 'hosts: files dns\npasswd: files\ngroup: files\n' > /etc/nsswitch.conf
printf '/bin/sh\n/bin/bash\n' > /etc/shells
printf 'sandbox\n' > /etc/hostname
printf 'PRETTY_NAME="Sandbox"\nNAME="Sandbox"\nID=sandbox\n' > /etc/os-release
printf '# ~/.bashrc\nexport HISTCONTROL=ignoreboth\n' > /root/.bashrc
printf '# ~/.profile\n' > /root/.profile
for package in bash coreutils findutils; do
    printf 'Package: %s\nStatus: install ok installed\nVersion: 1.0\nArchitecture: all\n' $package
    printf 'Maintainer: Nobody <nobody@localhost>\nDescription: part of the bare root\n\n'
done > /var/lib/dpkg/status
printf '2024-04-29 00:00:00 startup archives unpack\n' > /var/log/dpkg.log
touch -d 2024-04-29 /var/log/dpkg.log
touch /.dockerenv
