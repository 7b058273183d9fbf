/** When a request is over. */
import type { FastifyReply } from 'fastify';
import { setMaxListeners } from 'node:events';

/**
 * Calls `then` once, when the answer is sent or the client has left. Node tells an answer that waits behind others on its connection nothing
 * of a client that leaves; the connection knows.
 */
export function whenOver({ raw, request }: FastifyReply, then: () => void): void {
  const { socket } = request.raw;
  let isOver = false;
  const over = (): void => {
    if (isOver) return; // both may be told at once
    isOver = true;
    raw.off('close', over);
    socket.off('close', over);
    then();
  };
  setMaxListeners(0, socket); // as many as requests wait on it
  raw.on('close', over);
  socket.on('close', over);
}
