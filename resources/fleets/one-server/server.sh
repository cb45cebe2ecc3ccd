# The database, the application once that is there, and the web server. The first end of one is the end of all.
sh /counter/db.sh &
database=$!
trap 'kill -INT "$database"; wait "$database"; exit' TERM
until /usr/lib/postgresql/15/bin/pg_isready --quiet -h 127.0.0.1; do
    kill -0 "$database" || exit 1
    sleep 0.2
done
setpriv --reuid nobody --regid nogroup --clear-groups --inh-caps=-all perl /counter/app.pl &
nginx -e stderr -c /fleet/nginx.conf &
wait -n
exit 1
