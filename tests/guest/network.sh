# Run by the guest's process 1 in the host's file tree: NODES verbs devices,
# rxe0, rxe1, ..., each on an interface of its own, all on one bridged network:
#
#     rxe0 on node0 ──── port0 ─┬─ wire ─┬─ port1 ──── node1 with rxe1
#     10.77.0.1                (a bridge)              10.77.0.2
#
# In Linux 6.1, rxe works in the first network namespace only, so all interfaces
# live there, and the kernel would short-circuit what one of its addresses sends
# to another of its own. It must not: what leaves by node0 looks in a table that
# knows only node0's own address and the wire, and interfaces accept packets that
# come from an address of this same machine.

hostname "$HOSTNAME"
echo "127.0.1.1 $HOSTNAME" >>/etc/hosts
cd /proc/sys/net/ipv4/conf
for scope in all default; do
    echo 1 >$scope/accept_local
    echo 0 >$scope/rp_filter
    echo 1 >$scope/arp_ignore
    echo 2 >$scope/arp_announce
done
# A GID is usable once its address is; nobody here has the same one.
echo 0 >/proc/sys/net/ipv6/conf/default/accept_dad

{
    echo "link set lo up"
    echo "rule add pref 200 lookup local"
    echo "rule del pref 0"
    echo "link add wire mtu $MTU type bridge"
    echo "link set wire up"
    for node in $(seq 0 $((NODES - 1))); do
        address=$SUBNET.$((node + 1)) table=$((1000 + node))
        echo "link add node$node mtu $MTU type veth peer name port$node mtu $MTU"
        echo "link set port$node master wire up"
        echo "link set node$node up"
        echo "addr add $address/24 dev node$node"
        echo "rule add pref 100 iif lo oif node$node lookup $table"
        echo "route add local $address dev node$node table $table"
        echo "route add $SUBNET.0/24 dev node$node src $address table $table"
    done
} | ip -batch -

for node in $(seq 0 $((NODES - 1))); do
    rdma link add rxe$node type rxe netdev node$node
done

# Index 1 is the GID made from the IPv4 address; it comes a moment later.
unset=0000:0000:0000:0000:0000:0000:0000:0000
for node in $(seq 0 $((NODES - 1))); do
    tries=0
    while [ "$(cat /sys/class/infiniband/rxe$node/ports/1/gids/1)" = $unset ]; do
        tries=$((tries + 1))
        [ $tries -lt 1000 ] || { echo "rxe$node has no IPv4 GID"; exit 1; }
        sleep 0.01
    done
done
