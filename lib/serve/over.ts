/** Detects the end of a request. */
import type { FastifyReply } from 'fastify';
import { setMaxListeners } from 'node:events';

/**
 * Calls `then` once, when the response is sent or the client has disconnected. While a response waits behind others on its connection, Node
 * does not notify it of a disconnect, so this also listens to the connection.
 */
export function whenOver({ raw, request }: FastifyReply, then: () => void): void {
  const { socket } = request.raw;
  let isOver = false;
  const over = (): void => {
    if (isOver) return; // both events may fire
    isOver = true;
    raw.off('close', over);
    socket.off('close', over);
    then();
  };
  setMaxListeners(0, socket); // one listener per pipelined request
  raw.on('close', over);
  socket.on('close', over);
}
