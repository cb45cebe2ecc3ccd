# PostgreSQL on a disk of its own, which gets a file system and a database when it is blank. Whoever has the password, and is
# let there, reaches it.
set -e
bin=/usr/lib/postgresql/15/bin
as_postgres() { setpriv --reuid postgres --regid postgres --clear-groups --inh-caps=-all "$@"; }
mkdir -p /data /run/postgresql
blkid /dev/vda || mkfs.ext4 -q /dev/vda
mount /dev/vda /data
chown -R postgres: /data /run/postgresql
if [ ! -e /data/ready ]; then
    rm -rf /data/pg
    as_postgres "$bin/initdb" --no-sync -D /data/pg -U postgres -A scram-sha-256 --pwfile /run/secrets/password
    echo 'host all all all scram-sha-256' >> /data/pg/pg_hba.conf
    sync
    touch /data/ready
fi
exec setpriv --reuid postgres --regid postgres --clear-groups --inh-caps=-all \
    "$bin/postgres" -D /data/pg -k /run/postgresql -c listen_addresses='*' -c shared_buffers=16MB
