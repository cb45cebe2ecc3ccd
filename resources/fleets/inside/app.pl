# Answers every request at its port with that and its process.
use strict;
use warnings;
use IO::Socket::INET;

my ($port) = @ARGV;
# A client that has gone is no reason to end.
$SIG{PIPE} = 'IGNORE';
my $service = IO::Socket::INET->new(LocalAddr => '127.0.0.1', LocalPort => $port, Listen => 100, ReuseAddr => 1)
    or die "no port: $!";
while (my $client = $service->accept) {
    while (defined(my $line = <$client>)) { last if $line =~ /^\r?\n$/ }
    my $body = "port $port process $$\n";
    print $client "HTTP/1.0 200 OK\r\nContent-Length: " . length($body) . "\r\n\r\n$body";
    close $client;
}
