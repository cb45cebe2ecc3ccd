# Answers every request at port 8000 with who it is and what the database at $PGHOST has counted, over one connection to it.
use strict;
use warnings;
use DBI;
use IO::Socket::INET;
use Sys::Hostname;

open my $file, '<', '/run/secrets/password' or die "no password: $!";
chomp(my $password = <$file>);
my $db;

# A database that was started again is connected to again.
sub count {
    for (1 .. 2) {
        $db ||= DBI->connect_cached('dbi:Pg:dbname=postgres', 'postgres', $password, { PrintError => 0 }) or next;
        my ($count) = eval { $db->selectrow_array("select nextval('requests')") };
        return $count if defined $count;
        $db->disconnect;
        undef $db;
    }
    return undef;
}

# A client that has gone is no reason to end.
$SIG{PIPE} = 'IGNORE';
my $service = IO::Socket::INET->new(LocalPort => 8000, Listen => 100, ReuseAddr => 1) or die "no port: $!";
$db = DBI->connect('dbi:Pg:dbname=postgres', 'postgres', $password) or die 'no database';
$db->do('create sequence if not exists requests');
while (my $client = $service->accept) {
    while (defined(my $line = <$client>)) { last if $line =~ /^\r?\n$/ }
    my $count = count();
    my ($status, $body) = defined $count ? ('200 OK', hostname() . " $count\n") : ('503 No database', "no database\n");
    print $client "HTTP/1.0 $status\r\nContent-Length: " . length($body) . "\r\n\r\n$body";
    close $client;
}
