# PostgreSQL on the volume, which is made a database's when it is empty; those with the password reach it.
set -e
bin=/usr/lib/postgresql/15/bin
as_postgres() { setpriv --reuid postgres --regid postgres --clear-groups --inh-caps=-all "$@"; }
chown postgres: /data
chmod 700 /data
mkdir -p /run/postgresql
chown postgres: /run/postgresql
if [ ! -e /data/PG_VERSION ]; then
    as_postgres "$bin/initdb" --no-sync -D /data -U postgres -A scram-sha-256 --pwfile /run/secrets/password
    echo 'host all all all scram-sha-256' >> /data/pg_hba.conf
fi
exec setpriv --reuid postgres --regid postgres --clear-groups --inh-caps=-all \
    "$bin/postgres" -D /data -c listen_addresses='*' -c shared_buffers=16MB -c fsync=on
