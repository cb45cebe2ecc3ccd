# Three processes of the application, each started again when it ends, and nginx.
for port in 8001 8002 8003; do
    while :; do
        setpriv --reuid nobody --regid nogroup --clear-groups --inh-caps=-all perl /fleet/app.pl "$port"
        sleep 0.2
    done &
done
exec nginx -e stderr -c /fleet/nginx.conf
